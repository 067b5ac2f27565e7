"""Draw paired pictures before and after alignment, from the same captions and the same initial noise, and judge them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import DDIMScheduler

from dpo.tiny.judge import Judge, score

STEPS, GUIDANCE = 20, 3.0


def draw(
    unet,
    text_encoder,
    tokenizer,
    vae,
    scheduler,  # any diffusers scheduler; its noise schedule is taken, the sampler is DDIM
    prompts: list[str],  # [N]
    seeds: list[int],  # [N] each its own initial noise, whatever the batch
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 20,
) -> np.ndarray:
    """uint8 [N, H, W, 3]. Deterministic: one picture depends on its prompt and seed alone (up to rounding)."""
    sampler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    sampler.set_timesteps(steps, device=unet.device)

    def part(start: int) -> np.ndarray:
        chosen = slice(start, start + batch)
        return _draw_batch(unet, text_encoder, tokenizer, vae, sampler, prompts[chosen], seeds[chosen], guidance)

    with _a_thread_each(unet.device) as pool:
        return np.concatenate(list(pool.map(part, range(0, len(prompts), batch))))


@contextmanager
def _a_thread_each(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Batches side by side, each on one core: for a UNet this small that is half as fast again as all cores on one batch."""
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    start = partial(torch.set_num_threads, 1) if cores > 1 else None
    try:
        with ThreadPoolExecutor(cores, initializer=start) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


@torch.no_grad()  # a setting of the thread
def _draw_batch(unet, text_encoder, tokenizer, vae, sampler, prompts, seeds, guidance) -> np.ndarray:
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents_BCHW = torch.stack(noise).to(unet.device, unet.dtype)
    states_2BLD = text_encoder(token_ids([""] * len(prompts) + prompts, tokenizer).to(text_encoder.device)).last_hidden_state
    for t in sampler.timesteps:
        without, with_caption = unet(torch.cat([latents_BCHW] * 2), t, states_2BLD.to(unet.dtype)).sample.chunk(2)
        latents_BCHW = sampler.step(without + guidance * (with_caption - without), t, latents_BCHW).prev_sample
    decoded = vae.decode((latents_BCHW / vae.config.scaling_factor).to(vae.dtype)).sample
    return ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class Comparison:
    """What a judge found in N pairs of pictures."""

    pairs: int
    win_rate: float  # of the policy over the base; a tie counts half
    low: float  # 95 % interval of the win rate
    high: float
    faithful_base: float  # share of pictures whose object and colour are the caption's
    faithful_policy: float
    score_base: float  # mean hidden taste, 0..3
    score_policy: float


def wilson(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, 1927); half wins from ties are allowed."""
    share = wins / n
    centre = share + z * z / (2 * n)
    spread = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return float(max(0.0, (centre - spread) / scale)), float(min(1.0, (centre + spread) / scale))


def compare(judge: Judge, prompts: list[str], base_NHWC: np.ndarray, policy_NHWC: np.ndarray) -> Comparison:
    """Judge paired pictures [N, H, W, 3] of the same prompts and seeds."""
    base, policy = judge.read(base_NHWC), judge.read(policy_NHWC)
    return tally(score(base), score(policy), judge.faithful(base, prompts), judge.faithful(policy, prompts))


def tally(score_base: np.ndarray, score_policy: np.ndarray, faithful_base: np.ndarray, faithful_policy: np.ndarray) -> Comparison:
    """All [N]. Scores closer than a thousandth are a tie: the same picture twice is no win."""
    difference = score_policy - score_base
    wins = float((difference > 1e-3).sum() + 0.5 * (np.abs(difference) <= 1e-3).sum())
    low, high = wilson(wins, len(difference))
    return Comparison(
        pairs=len(difference),
        win_rate=wins / len(difference),
        low=low,
        high=high,
        faithful_base=float(np.mean(faithful_base)),
        faithful_policy=float(np.mean(faithful_policy)),
        score_base=float(np.mean(score_base)),
        score_policy=float(np.mean(score_policy)),
    )


def token_ids(texts: list[str], tokenizer) -> torch.Tensor:
    """[N, model_max_length] padded as Stable Diffusion pads."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

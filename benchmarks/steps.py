"""Training steps of full-size UNets with random weights: the peers' step as they run it, then ours, one thing at a
time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import captured, median_seconds, peak_memory_gib
from benchmarks.step import peers_encoding, peers_loss
from dpo import reference
from dpo.common.words import first_line
from dpo.encode import Inputs
from dpo.models import lora
from dpo.models.denoiser import halve, use_checkpointing
from dpo.models.family import Denoise, Model, TextEncoding, families
from dpo.schedule import Schedule, noise_path
from dpo.step import PairStep
from dpo.training import flops, optimizer

EFFECTIVE = 2048  # pairs an update, over which the optimizer's time is spread

SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL_UNET = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Size:
    """What is measured: a UNet of this config, the text it is given, and the peers' way of running it."""

    name: str
    family: str
    unet: dict[str, Any]
    text: tuple[int, int]  # tokens, width
    pooled: int | None
    peer_checkpointing: bool
    large_batch: int


@dataclass(frozen=True)
class Setting:
    """One row: everything that is switched on."""

    name: str
    pairs: int = 1
    precision: str = "bf16"
    encode: bool = False  # VAE and text encoders in the step
    checkpointing: bool = False
    channels_last: bool = False
    kernels: bool = False
    compiled: bool = False
    graph: bool = False
    recorded: bool = False
    low_rank: bool = False
    optimizer: str = "adamw"


SD15 = Size("SD 1.5, 512 px", "sd", SD15_UNET, (77, 768), None, False, 32)
SDXL = Size("SDXL, 1024 px", "sdxl", SDXL_UNET, (77, 2048), 1280, True, 8)


def small_model() -> Size:
    """For a CPU and for checks."""
    return Size("small", "sd", SMALL_UNET, (7, 32), None, False, 2)


def ladder(model: Size) -> Iterator[Setting]:
    """Ours, adding one thing at a time to the peers' choices."""
    row = Setting("prepared latents and captions", checkpointing=model.peer_checkpointing)
    yield row
    yield (row := replace(row, name="+ large micro-batch", pairs=model.large_batch))
    if model.peer_checkpointing:
        yield (row := replace(row, name="+ no checkpointing", checkpointing=False))
    yield (row := replace(row, name="+ 8-bit optimizer", optimizer="adamw8bit"))
    yield (row := replace(row, name="+ channels_last", channels_last=True))
    yield (row := replace(row, name="+ kernels", kernels=True))
    yield replace(row, name="+ CUDA graph (no compile)", graph=True)
    yield (row := replace(row, name="+ compile", compiled=True))
    yield (row := replace(row, name="+ recorded reference", recorded=True))
    yield replace(row, name="LoRA, recorded reference", low_rank=True)


def make_unet(model: Size, device: torch.device) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**model.unet).requires_grad_(False).eval()


def make_vae(model: Size, device: torch.device) -> nn.Module:
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    with torch.device(device):
        return AutoencoderKL(**(VAE | (small if model.name == "small" else {}))).requires_grad_(False).eval()


def step_of(model: Size, setting: Setting, device: torch.device) -> tuple[PairStep, Inputs, Tensor]:
    """The trainer's own forward on synthetic prepared inputs, ready to be called."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setting.precision)
    unet = make_unet(model, device)
    layers: list[nn.Module] = []
    if setting.low_rank:
        layers = lora.add(
            unet, rank=8, alpha=8.0, target_modules=("to_q", "to_k", "to_v", "to_out.0"), dropout=0.0, seed=0
        )
        if half is not None:
            halve(unet, half)
        unet.to(device)
    else:
        unet.requires_grad_(True)
    twin = None if setting.recorded or setting.low_rank else reference.frozen(unet, half)
    family = families()[model.family]
    used = [family.denoise(_settled(module, setting, device)) for module in (unet, twin) if module is not None]
    compared = reference.from_copy(used[1]) if twin is not None else None
    if setting.low_rank and not setting.recorded:
        compared = reference.from_adapters(used[0], layers)
    vae = SimpleNamespace(config={"scaling_factor": 0.18215})
    parts = Model(family, unet, vae, [], [], {}, model.name, None)
    step = PairStep(
        model=parts,
        policy=used[0],
        reference=compared,
        path=noise_path(
            Schedule(torch.linspace(0.999, 0.005, 1000), "epsilon"), torch.arange(1000), torch.float32, device
        ),
        weight=torch.ones(1000, device=device),
        beta=torch.tensor(2000.0, device=device),
        seed=torch.tensor(0, device=device),
        shape="sigmoid",
        sft_weight=0.0,
        autocast=half,
        dtype=torch.float32,
    )
    return step, inputs_of(model, setting, device, half), torch.zeros(1000, device=device)


def _settled(unet: nn.Module, setting: Setting, device: torch.device) -> Any:
    if setting.channels_last:
        unet.to(memory_format=torch.channels_last)
    use_checkpointing(unet, "on" if setting.checkpointing else "off")
    if setting.kernels and device.type == "cuda":
        from dpo.models import kernels

        kernels.patch(unet)
    return torch.compile(unet) if setting.compiled else unet


def inputs_of(model: Size, setting: Setting, device: torch.device, half: torch.dtype | None) -> Inputs:
    """What a prepared store gives: posterior mean and std, encoded captions."""
    pairs, side = setting.pairs, model.unet["sample_size"]
    index = torch.arange(pairs, device=device)
    dtype = half or torch.float32
    mean = torch.randn(2 * pairs, 4, side, side, device=device)
    text = TextEncoding(
        torch.randn(pairs, *model.text, device=device).to(dtype),
        None if model.pooled is None else torch.randn(pairs, model.pooled, device=device).to(dtype),
    )
    micro = torch.tensor([8 * side, 8 * side, 0, 0, 8 * side, 8 * side], device=device).repeat(2 * pairs, 1)
    one = torch.ones(pairs, device=device)
    return Inputs(index + 1, torch.zeros_like(index), one, one.clone(), mean, torch.full_like(mean, 0.05), text, micro)


def peers_step(model: Size, device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    """A step as the peers run it: micro-batch 1, fp16 autocast eager, VAE and text encoding inside, streamed noise,
    reference live.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    half = torch.float16 if device.type == "cuda" else torch.float32
    policy = make_unet(model, device)
    twin = reference.frozen(policy, None).to(half)
    policy.requires_grad_(True)
    use_checkpointing(policy, "on" if model.peer_checkpointing else "off")
    vae = make_vae(model, device).to(torch.float32 if model.family == "sdxl" else half)
    tokens, width = model.text
    depth = (
        {"vocab_size": 49408, "num_hidden_layers": 12, "num_attention_heads": 12}
        if width >= 768
        else {"vocab_size": 99, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    config = CLIPTextConfig(
        hidden_size=768 if width >= 768 else 32,
        intermediate_size=3072 if width >= 768 else 64,
        max_position_embeddings=tokens,
        **depth,
    )
    encoder = CLIPTextModel(config).to(device, half).requires_grad_(False)
    side = model.unet["sample_size"]
    pixels = torch.rand(2, 3, 8 * side, 8 * side, device=device) * 2 - 1
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
    abar = torch.linspace(0.999, 0.005, 1000, device=device)
    filler = torch.randn(1, tokens, width, device=device, dtype=half)
    pooled = None if model.pooled is None else torch.randn(1, model.pooled, device=device, dtype=half)
    sizes = torch.tensor([8.0 * side, 8 * side, 0, 0, 8 * side, 8 * side], device=device).repeat(2, 1)

    def wrapped(module: nn.Module) -> Denoise:
        def denoise(x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
            added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": sizes}
            x_t = x_t.to(half) if module is twin else x_t
            with torch.autocast(device.type, half, enabled=device.type == "cuda"):
                return module(x_t, t, text.hidden, added_cond_kwargs=added).sample

        return denoise

    def encode_text() -> TextEncoding:
        hidden = encoder(ids).last_hidden_state
        return TextEncoding(hidden if hidden.shape[-1] == width else filler, pooled)

    def step() -> None:
        latents, text = peers_encoding(vae, pixels, encode_text)
        peers_loss(wrapped(policy), wrapped(twin), latents, text, sizes, abar).backward()

    return step, list(policy.parameters())


def our_step(model: Size, setting: Setting, device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    """The trainer's micro-step, forward and backward; as a replayed CUDA graph where asked for."""
    step, inputs, correction = step_of(model, setting, device)
    recorded = torch.full((2, setting.pairs), 0.1, device=device) if setting.recorded else None
    parameters = [p for p in step.model.denoiser.parameters() if p.requires_grad]

    def run() -> None:
        terms = step(inputs, correction, recorded=recorded)
        (terms.loss.sum() / EFFECTIVE).backward()

    if not setting.graph:
        return run, parameters
    graph, _ = captured(run)
    return graph.replay, parameters


def optimizer_seconds(kind: str, parameters: list[Tensor], device: torch.device) -> float:
    """One update, which 2048 pairs share."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    made = optimizer.build(kind, parameters, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    return median_seconds(made.step, device, 0.2)


def rows(model: Size, device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """The peers' step, then the ladder; each row in units of the first. What fails is a row that says why."""
    base: float | None = None
    forward = flops.unet_flops(model.unet, model.unet["sample_size"], model.unet["sample_size"], model.text[0])
    for setting in (None, *ladder(model)):
        name = "peers: micro-batch 1, encoding in the step" if setting is None else setting.name
        row: dict[str, Any] = {"model": model.name, "setting": name, "pairs": 1 if setting is None else setting.pairs}
        if setting is not None and device.type != "cuda" and (setting.graph or setting.compiled):
            continue  # seconds to compile, and nothing to learn from it without a GPU
        if setting is not None and device.type != "cuda":
            setting = replace(setting, precision="fp32")  # half precision is emulated on most CPUs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step, parameters = peers_step(model, device) if setting is None else our_step(model, setting, device)
            seconds = median_seconds(step, device, budget)
            update = optimizer_seconds("adamw" if setting is None else setting.optimizer, parameters, device)
            rate = 1 / (seconds / row["pairs"] + update / EFFECTIVE)
            trained = "lora" if setting is not None and setting.low_rank else "full"
            live = "recorded" if setting is not None and setting.recorded else "live"
            useful = flops.pair_flops(forward, trainable=trained, reference=live) * rate / 1e12
            peak = flops.peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            base = rate if setting is None else base
            row |= {
                "ms per micro-step": seconds * 1e3,
                "ms per update": update * 1e3,
                "pairs/s": rate,
                "x peers": rate / base if base else None,
                "TFLOP/s": useful,
                "MFU": useful / peak if peak else None,
                "GiB": peak_memory_gib(device),
            }
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {first_line(error)[:160]}"
        step = parameters = None
        yield row

"""Five updates equal those of a loop in plain eager torch, written out here without kernels, fused batch or loader."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from csrc_triton.philox import Stream, integers, normal
from tests.help.flow import SMALL, TRAINED
from tests.help.running import advance, make_run, weights

UPDATES, PAIRS, SEED, BETA, RATE = 5, 4, 7, 2000.0, 1e-4


class Plain:
    """The model of a folder, and Diffusion-DPO on it, written down directly from the paper."""

    modules = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, folder: str, sdxl: bool):
        options = {"torch_dtype": torch.float64}
        self.policy = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options)
        self.reference = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options).requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **options)
        self.schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")]
        self.encoders = [CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float64)]
        if sdxl:
            self.tokenizers.append(CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2"))
            second = CLIPTextModelWithProjection.from_pretrained(
                folder, subfolder="text_encoder_2", dtype=torch.float64
            )
            self.encoders.append(second)
        self.sdxl = sdxl

    @torch.no_grad()
    def text(self, caption: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            ids = tokenizer(
                caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            found.append(encoder(ids, output_hidden_states=True))
        if not self.sdxl:
            return found[0].last_hidden_state, None
        return torch.cat([out.hidden_states[-2] for out in found], dim=-1), found[1].text_embeds

    def latents(self, pixels, posterior_noise) -> torch.Tensor:
        posterior = self.vae.encode(pixels[None].double() / 127.5 - 1).latent_dist
        return (posterior.mean + posterior.std * posterior_noise) * self.vae.config.scaling_factor

    def shape(self, side: int) -> tuple[int, ...]:
        """Of the latents of an image of `side` pixels."""
        side //= 2 ** (len(self.vae.config.block_out_channels) - 1)
        return 4, side, side

    def error(self, unet, pixels, caption, micro, t, noise, posterior_noise) -> torch.Tensor:
        """Mean squared error of one image."""
        with torch.no_grad():
            latents = self.latents(pixels, posterior_noise)
        abar = self.schedule.alphas_cumprod.double()[t]
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        hidden, pooled = self.text(caption)
        added = {"text_embeds": pooled, "time_ids": micro[None].double()} if self.sdxl else None
        prediction = unet(noisy, t[None], hidden, added_cond_kwargs=added).sample
        v = self.schedule.config.prediction_type == "v_prediction"
        target = abar.sqrt() * noise - (1 - abar).sqrt() * latents if v else noise
        return F.mse_loss(prediction, target)

    def pair_loss(self, batch, i, reference_error) -> torch.Tensor:
        key, draw = batch.keys[i : i + 1], batch.draws[i : i + 1]
        shape = self.shape(batch.pixels.shape[-1])
        t = integers(key, draw, Stream.TIMESTEP, SEED, 0, 1000)[0]
        noise = normal(key, draw, Stream.NOISE, SEED, shape, torch.float64)
        errors = {}
        for half, stream in ((0, Stream.VAE_WIN), (1, Stream.VAE_LOSE)):
            row = i + half * len(batch)
            extra = normal(key, draw, stream, SEED, shape, torch.float64)
            arguments = (batch.pixels[row], batch.captions[i], batch.micro[row], t, noise, extra)
            errors["policy", half] = self.error(self.policy, *arguments)
            errors["reference", half] = reference_error(*arguments)
        win = errors["policy", 0] - errors["reference", 0]
        lose = errors["policy", 1] - errors["reference", 1]
        return -F.logsigmoid(-BETA / 2 * (win - lose))


class PlainSD3(Plain):
    """Flow-DPO (Liu et al. 2025) on Stable Diffusion 3: x_s = (1 - s) x_0 + s noise, target noise - x_0."""

    modules = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj")
    modules += ("attn.add_v_proj", "attn.to_add_out")
    pipeline = StableDiffusion3Pipeline

    def __init__(self, folder: str):
        self.pipe, twin = (self.pipeline.from_pretrained(folder, torch_dtype=torch.float64) for _ in range(2))
        self.policy, self.reference = self.pipe.transformer, twin.transformer.requires_grad_(False)
        self.vae = self.pipe.vae

    def latents(self, pixels, posterior_noise) -> torch.Tensor:
        posterior = self.vae.encode(pixels[None].double() / 127.5 - 1).latent_dist
        clean = posterior.mean + posterior.std * posterior_noise
        return (clean - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def level(self, t) -> torch.Tensor:
        s = (t.double() + 1) / 1000
        return 3 * s / (1 + 2 * s)

    def predict(self, transformer, noisy, s, caption) -> torch.Tensor:
        with torch.no_grad():
            hidden, _, pooled, _ = self.pipe.encode_prompt(
                caption, None, None, do_classifier_free_guidance=False, max_sequence_length=64
            )
        return transformer(noisy, hidden, pooled, 1000 * s[None], return_dict=False)[0]

    def error(self, transformer, pixels, caption, micro, t, noise, posterior_noise) -> torch.Tensor:
        with torch.no_grad():
            latents = self.latents(pixels, posterior_noise)
        s = self.level(t)
        return F.mse_loss(self.predict(transformer, (1 - s) * latents + s * noise, s, caption), noise - latents)


class PlainFlux(PlainSD3):
    """The same on FLUX.1: four latents are a token, s is shifted by e^mu, and the guidance scale is told."""

    modules = (*PlainSD3.modules, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    pipeline = FluxPipeline

    def level(self, t) -> torch.Tensor:
        s = (t.double() + 1) / 1000
        factor = math.exp(0.5 + (1.15 - 0.5) * (TOKENS - 256) / (4096 - 256))
        return factor * s / (1 + (factor - 1) * s)

    def predict(self, transformer, noisy, s, caption) -> torch.Tensor:
        with torch.no_grad():
            hidden, pooled, words = self.pipe.encode_prompt(caption, max_sequence_length=64)
        side = noisy.shape[-1]
        tokens = self.pipe._pack_latents(noisy, 1, noisy.shape[1], side, side)
        places = self.pipe._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float64)
        found = transformer(tokens, hidden, pooled, s[None], places, words, torch.tensor([3.5]), return_dict=False)[0]
        return self.pipe._unpack_latents(found, side, side, 1)


class PlainKlein(PlainFlux):
    """The same on FLUX.2 klein: latents are packed and scaled by the VAE's statistics before they are noised."""

    modules = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out")
    pipeline = Flux2KleinPipeline

    def shape(self, side: int) -> tuple[int, ...]:
        return 16, side // 8, side // 8

    def latents(self, pixels, posterior_noise) -> torch.Tensor:
        posterior, norm = self.vae.encode(pixels[None].double() / 127.5 - 1).latent_dist, self.vae.bn
        mean, std = (self.pipe._patchify_latents(x) for x in (posterior.mean, posterior.std))
        clean, centre = mean + std * posterior_noise, norm.running_mean.view(-1, 1, 1)
        return (clean - centre) / (norm.running_var.view(-1, 1, 1) + self.vae.config.batch_norm_eps).sqrt()

    def level(self, t) -> torch.Tensor:
        s, factor = (t.double() + 1) / 1000, math.exp(compute_empirical_mu(TOKENS, 50))
        return factor * s / (1 + (factor - 1) * s)

    def predict(self, transformer, noisy, s, caption) -> torch.Tensor:
        with torch.no_grad():
            hidden, words = self.pipe.encode_prompt(caption, max_sequence_length=64)
        tokens, places = self.pipe._pack_latents(noisy), self.pipe._prepare_latent_ids(noisy)
        found = transformer(tokens, hidden, s[None], places, words, return_dict=False)[0]
        return self.pipe._unpack_latents_with_ids(found, places)


class PlainQwen(PlainSD3):
    """The same on Qwen-Image, with each caption as long as it is and no mask."""

    modules = (*PlainSD3.modules, "img_mlp.net.2", "txt_mlp.net.2")
    pipeline = QwenImagePipeline

    def shape(self, side: int) -> tuple[int, ...]:
        return 4, side // 4, side // 4

    def latents(self, pixels, posterior_noise) -> torch.Tensor:
        posterior = self.vae.encode(pixels[None, :, None].double() / 127.5 - 1).latent_dist
        clean = (posterior.mean + posterior.std * posterior_noise[:, :, None])[:, :, 0]
        mean, std = (torch.tensor(self.vae.config[key]).double() for key in ("latents_mean", "latents_std"))
        return (clean - mean[:, None, None]) / std[:, None, None]

    def level(self, t) -> torch.Tensor:
        s = (t.double() + 1) / 1000
        tokens = 4 * 4
        shift = math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))
        return shift / (shift + 1 / s - 1)

    def predict(self, transformer, noisy, s, caption) -> torch.Tensor:
        with torch.no_grad():
            hidden, mask = self.pipe.encode_prompt(caption)
        assert mask is None
        tokens = self.pipe._pack_latents(noisy, 1, *noisy.shape[1:])
        found = transformer(tokens, hidden, None, s[None], [[(1, 4, 4)]], return_dict=False)[0]
        return self.pipe._unpack_latents(found, 32, 32, 4)[:, :, 0]


TOKENS = 16  # of an image of 32 pixels
FLOW = {"sd35": PlainSD3, "flux-dev": PlainFlux, "flux2-klein-base": PlainKlein, "qwen-image": PlainQwen}

SLOW = (("sd2v", True), ("sdxl", True), *((kind, True) for kind in TRAINED))  # an adapter is the same in every family
FIRST = (("sd15", False), ("sd15", True), ("sd35", False))
CASES = [(kind, low_rank) for low_rank in (False, True) for kind in ("sd15", "sd2v", "sdxl")]
CASES += [(kind, low_rank) for kind in TRAINED for low_rank in (False, True)]


@pytest.mark.parametrize(
    ("kind", "low_rank"),
    [
        pytest.param(
            *case,
            marks=[] if case in FIRST else [pytest.mark.slow if case in SLOW else pytest.mark.long],
            id=f"{'lora' if case[1] else 'full'}-{case[0]}",
        )
        for case in CASES
    ],
)
def test_five_updates_equal_a_plain_loop(world, tmp_path, kind, low_rank):
    flags = [
        "--precision",
        "fp64",
        "--seed",
        str(SEED),
        "--beta",
        str(BETA),
        "--learning-rate",
        str(RATE),
        "--batch-size",
        str(PAIRS),
        *(SMALL if kind in FLOW else ()),
    ]
    run = make_run(world(kind), world("pairs"), tmp_path, *flags, *(["--lora"] if low_rank else []))
    batches = run.batches()
    data = [next(batches) for _ in range(UPDATES)]
    batches.close()

    plain = FLOW[kind](world(kind)) if kind in FLOW else Plain(world(kind), kind == "sdxl")
    if low_rank:
        from dpo.models import lora

        plain.policy.requires_grad_(False)
        modules = plain.modules
        lora.add(plain.policy, rank=8, alpha=8, target_modules=modules, dropout=0.0, seed=SEED)
        plain.policy.to(torch.float64)
    trained = {name: p for name, p in plain.policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)

    def reference_error(*arguments):
        with torch.no_grad():
            return plain.error(plain.reference, *arguments)

    losses = []
    for batch in data:
        loss = torch.stack([plain.pair_loss(batch, i, reference_error) for i in range(PAIRS)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    figures = advance(run, UPDATES)
    assert [figure["loss"] for figure in figures] == pytest.approx(losses, rel=1e-9)
    found = weights(run)
    assert found.keys() == trained.keys()
    # Adam divides by the root of the squared gradient: where that is near 0 it magnifies rounding, up to a whole update
    worst = max((found[name] - trained[name]).abs().max().item() for name in trained)
    assert worst < 1e-2 * RATE
    start = dict(plain.reference.named_parameters())
    moved = [(found[name] - start[name]).abs().max().item() for name in found if name in start]
    assert low_rank or max(moved) > RATE

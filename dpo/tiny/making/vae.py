"""The autoencoder: 64x64 pictures to 16x16x4 latents; decodes hundreds of pictures in seconds on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# From its own module: at the top of diffusers mypy finds only a stand-in without methods.
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from dpo.tiny.judge import pixels
from dpo.tiny.making import loop
from dpo.tiny.making.scenes import CANVAS, Renderer, Scenes, World

NARROWER = 0.1  # factor on the posterior's standard deviation once the encoder is trained
CHECK = 256  # pictures that the deviation of latents is measured on
NOISE = 0.1  # standard deviation of the noise on latents (theirs is 1) when the decoder is refined


def build() -> AutoencoderKL:
    """A new autoencoder."""
    return AutoencoderKL(
        sample_size=CANVAS,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def reconstruction(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of pictures [N, 3, H, W]: L1, squared error, and L1 of neighbours' differences, for sharp outlines."""
    error = output - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def train(
    rank: int,
    world: World,
    render: Renderer,
    plan: loop.Plan,
    kl: float,
    folder: Path,
    start: Path | None = None,
) -> None:
    """One process of the training, from new weights or those in `start`; at the end folder/final holds the autoencoder.

    kl: weight of the KL term, summed over a latent.
    """
    torch.manual_seed(plan.seed)
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(start) if start else build()

    def loss_of(draw: loop.Draw, batch: int) -> torch.Tensor:
        target = pixels(render(world.sample(draw.numpy, batch, combinations="all")))
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw.torch)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction(output, target) + kl * posterior.kl().mean()

    loop.train(vae, loss_of, plan, folder, rank=rank)
    if rank == 0:
        check = render(world.sample(np.random.default_rng((plan.seed, 1)), CHECK, combinations="all"))
        vae.register_to_config(scaling_factor=1.0)
        deviation = encode(vae, check).std().item()
        vae.register_to_config(scaling_factor=round(1 / deviation, 4))  # latents of unit deviation
        vae.save_pretrained(folder / "final")


def refine(
    rank: int,
    vae: AutoencoderKL,
    latents: torch.Tensor,
    scenes: Scenes,
    render: Renderer,
    plan: loop.Plan,
    folder: Path,
) -> None:
    """One process that trains the decoder alone, on latents [N, 4, 16, 16] of `scenes`, so that those stay as they are.

    The latents get a little noise, for those that a diffusion model draws are not exact either.
    """
    assert vae.quant_conv is not None and vae.post_quant_conv is not None and vae.quant_conv.bias is not None
    decoder = nn.ModuleDict({"conv": vae.post_quant_conv, "net": vae.decoder}).requires_grad_(True)

    def loss_of(draw: loop.Draw, batch: int) -> torch.Tensor:
        rows = draw.numpy.integers(len(scenes), size=batch)
        inputs = latents[torch.from_numpy(rows)].float()
        inputs = inputs + NOISE * torch.randn(inputs.shape, generator=draw.torch)
        output = decoder["net"](decoder["conv"](inputs / vae.config["scaling_factor"]))
        return reconstruction(output, pixels(render(scenes.take(rows))))

    loop.train(decoder, loss_of, plan, folder, rank=rank)
    if rank == 0:
        with torch.no_grad():  # trainers sample from the posterior, which the KL term kept wider than the decoder needs
            vae.quant_conv.bias[vae.config["latent_channels"] :] += 2 * math.log(NARROWER)
        vae.save_pretrained(folder / "final")


@torch.no_grad()
def psnr(vae: AutoencoderKL, images_NHWC: np.ndarray) -> float:
    """Peak signal-to-noise ratio of encoding and decoding, in dB, mean over pictures uint8 [N, H, W, 3]."""
    target = pixels(images_NHWC)
    output = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / F.mse_loss(output, target, reduction="none").mean((1, 2, 3)))).mean().item()


@torch.no_grad()
def encode(vae: AutoencoderKL, images_NHWC: np.ndarray, batch: int = 64) -> torch.Tensor:
    """Scaled latents (the posterior's mean), float32 [N, 4, 16, 16], of pictures uint8 [N, H, W, 3]."""
    parts = [vae.encode(pixels(images_NHWC[i : i + batch])).latent_dist.mean for i in range(0, len(images_NHWC), batch)]
    return torch.cat(parts) * vae.config["scaling_factor"]

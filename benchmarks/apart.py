"""Up to which timestep noise leaves a pair's pictures distinguishable: where a taste can be learned at all."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from dpo.pages.figures import DECILES
from dpo.tiny import paths

PAIRS = 200  # looked at


@torch.no_grad()
def told_apart(pairs: Path) -> list[float]:
    """[10]: by tenth of the timesteps, how often the best observer says rightly which of a pair's pictures was noised.

    pairs: a Pick-a-Pic table of the embedded world. x_t = signal x_0 + spread eps of either picture with independent
    eps: the likelihood ratio is right with probability Phi(signal |x_win - x_lose| / (2 spread)). Taken at the middle of
    each tenth, the mean over the first pairs; one half is guessing.
    """
    vae = AutoencoderKL.from_pretrained(paths.pipeline_path() / "vae").eval()
    table = pq.read_table(pairs, columns=["jpg_0", "jpg_1"]).slice(0, PAIRS)
    first, second = (vae.encode(_pixels(table[name].to_pylist())).latent_dist.mean for name in ("jpg_0", "jpg_1"))
    distance = ((first - second) * vae.config.scaling_factor).flatten(1).norm(dim=1).double()
    abar = DDPMScheduler.from_pretrained(paths.pipeline_path() / "scheduler").alphas_cumprod.double()
    middle = torch.arange(DECILES) * len(abar) // DECILES + len(abar) // (2 * DECILES)
    ratio = (abar[middle] / (1 - abar[middle])).sqrt()
    right = 0.5 * (1 + torch.erf(ratio[:, None] * distance / (2 * math.sqrt(2))))
    return right.mean(1).tolist()


def _pixels(files: list[bytes]) -> Tensor:
    """[N, 3, H, W] in -1..1."""
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1

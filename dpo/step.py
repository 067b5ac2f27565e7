"""A micro-batch of pairs, from pixels to the loss of each pair: the fused shared-batch forward.

The win and lose halves of B pairs go through the UNet in one call on 2B samples, winners first; both halves of a pair
share their timestep, their noise and one encoding of their caption. Everything random is keyed by (seed, pair key, draw),
so results do not depend on how pairs are grouped. Nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csrc_triton.noising import noise_pairs, sample_posterior
from csrc_triton.philox import Stream, integers
from csrc_triton.preference_loss import PreferenceLoss, preference_loss
from dpo.models import Components, TextEncoding
from dpo.reference import Predict


class Inputs(NamedTuple):
    """B pairs on the training device; wins are rows 0..B-1, losers B..2B-1 of everything that has 2B rows."""

    keys: Tensor  # [B] int64 pair keys
    draws: Tensor  # [B] int64, the epoch
    prob: Tensor  # [B] fp32 in [0.5, 1]
    usable: Tensor  # [B] fp32, 0 for a hole
    latent_mean: Tensor  # [2B, 4, h, w] VAE posterior, unscaled
    latent_std: Tensor  # [2B, 4, h, w]
    text: TextEncoding  # [B, ...]
    micro: Tensor | None  # [2B, 6] int64, SDXL's size and crop of each image


@dataclass
class Encoder:
    """Text encoders and VAE, under no_grad in their own dtype; with `offload` they rest on the CPU between calls."""

    model: Components
    device: torch.device
    vae_batch: int
    offload: bool = False

    def _place(self, modules: list[nn.Module], busy: bool) -> None:
        for module in modules:
            module.to(self.device if busy or not self.offload else "cpu")

    def _dtype(self, module: nn.Module) -> torch.dtype:
        return next(module.parameters()).dtype

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, 3, H, W] uint8 -> mean and std of the VAE's posterior [N, 4, h, w]."""
        vae = self.model.vae
        self._place([vae], busy=True)
        means, stds = [], []
        for part in pixels.split(self.vae_batch):
            x = part.to(self.device, non_blocking=True).to(self._dtype(vae)) / 127.5 - 1
            posterior = vae.encode(x).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
        self._place([vae], busy=False)
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def text(self, captions: list[str]) -> TextEncoding:
        """B captions -> their encoding [B, ...]."""
        self._place(self.model.text_encoders, busy=True)
        encoding = self.model.family.encode(self.model, captions)
        self._place(self.model.text_encoders, busy=False)
        return encoding

    def inputs(self, batch: Any) -> Inputs:
        """A PairBatch from the loader -> tensors on the device."""
        move = {"device": self.device, "non_blocking": True}
        if batch.latent_mean is not None:
            mean, std, text = batch.latent_mean.to(**move), batch.latent_std.to(**move), TextEncoding(*batch.text).to(self.device)
        else:
            (mean, std), text = self.posterior(batch.pixels), self.text(batch.captions)
        micro = batch.micro.to(**move) if batch.micro is not None else None
        return Inputs(
            batch.keys.to(**move), batch.draws.to(**move), batch.prob.to(**move), batch.usable.to(**move), mean, std, text, micro
        )


@dataclass
class PairStep:
    """The forward of a micro-batch. Tables and scalars are device tensors, so that nothing freezes in a captured graph."""

    model: Components
    policy: Any  # the UNet, compiled or not
    reference: Predict | None
    alphas_cumprod: Tensor  # [T] fp32
    timesteps: Tensor  # [K] int64, those that may be drawn
    weight: Tensor  # [T]
    beta: Tensor  # 0-d
    seed: Tensor  # 0-d int64
    shape: str
    sft_weight: float
    autocast: torch.dtype | None
    dtype: torch.dtype  # of x_t: fp32, or fp64 / bf16 where the weights are
    wins_only: bool = False  # sft never looks at the losers: their predictions and errors are nan

    def predict(self, unet: Any, x_t: Tensor, t: Tensor, text: TextEncoding, micro: Tensor | None) -> Tensor:
        """The prediction for N noisy latents [N, 4, h, w] at timesteps t [N]."""
        if self.autocast is None:
            text = text.to(x_t.device, x_t.dtype)
        with self._autocast():
            return unet(x_t, t, **self.model.family.condition(text, micro), return_dict=False)[0]

    def _autocast(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.alphas_cumprod.device.type, dtype=self.autocast)

    def draw_timesteps(self, keys: Tensor, draws: Tensor) -> Tensor:
        """t [B], uniform over the allowed timesteps."""
        return self.timesteps[integers(keys, draws, Stream.TIMESTEP, self.seed, 0, self.timesteps.numel())]

    def latents(self, x: Inputs) -> Tensor:
        """Keyed samples of the VAE's posterior, scaled as the UNet expects them: [2B, 4, h, w]."""
        config = self.model.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        wide = torch.promote_types(self.dtype, torch.float32)
        mean, std = x.latent_mean.to(wide), x.latent_std.to(wide)
        return sample_posterior(mean, std, x.keys, x.draws, self.seed, config.scaling_factor, shift)

    def __call__(self, x: Inputs, correction: Tensor, recorded: Tensor | None = None) -> tuple[PreferenceLoss, Tensor]:
        """Loss of each pair and the timesteps [B]. correction [T]: DDE's C; recorded [2, B]: reference errors."""
        t = self.draw_timesteps(x.keys, x.draws)
        latents = self.latents(x)
        x_t = noise_pairs(latents, t, self.alphas_cumprod, x.keys, x.draws, self.seed, out_dtype=self.dtype)
        if self.wins_only:
            half = t.numel()
            wins = self.predict(self.policy, x_t[:half], t, x.text, None if x.micro is None else x.micro[:half])
            policy = torch.cat([wins, torch.full_like(wins, torch.nan)])
        else:
            policy = self.predict(self.policy, x_t, t.repeat(2), x.text.twice(), x.micro)
        live = self.reference is not None and recorded is None
        reference = self.predict(self.reference, x_t, t.repeat(2), x.text.twice(), x.micro) if live else None
        v_target = self.model.prediction_type == "v_prediction"
        terms = preference_loss(
            policy,
            t,
            x.prob,
            x.usable,
            self.weight,
            correction,
            self.beta,
            shape=self.shape,
            reference=reference,
            recorded=None if recorded is None else recorded.to(t.device, non_blocking=True),
            noise=(x.keys, x.draws, self.seed),
            latents=latents if v_target else None,
            alphas_cumprod=self.alphas_cumprod if v_target else None,
            sft_weight=self.sft_weight,
        )
        return terms, t

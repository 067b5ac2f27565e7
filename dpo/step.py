"""A micro-batch of pairs, from pixels to the loss of each pair: the fused shared-batch forward.

The win and lose halves of B pairs go through the UNet in one call on 2B samples, winners first; both halves of a pair
share their timestep, their noise and one encoding of their caption. Everything random is keyed by (seed, pair key, draw),
so results do not depend on how pairs are grouped. Nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csrc_triton.noising import noise_pairs, sample_posterior
from csrc_triton.philox import Stream, integers
from csrc_triton.preference_loss import PreferenceLoss, preference_loss
from dpo.encode import Inputs
from dpo.models.family import Model, TextEncoding
from dpo.reference import Predict


@dataclass
class PairStep:
    """The forward of a micro-batch. Tables and scalars are device tensors, so that nothing freezes in a captured graph."""

    model: Model
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

"""A micro-batch of pairs, from latents to the loss of each pair: the fused shared-batch forward.

The win and lose halves of B pairs go through the denoiser in one call on 2B samples, winners first; both halves of a
pair share their timestep, their noise and one encoding of their caption. Of images without a partner B samples go
through, and what the kernels get for the other half is zeros, alike of policy and reference: its part of d is exactly 0.
Everything random is keyed by (seed, pair key, draw), so results do not depend on how pairs are grouped. Nothing here
waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton.noising import noise_pairs, sample_posterior
from csrc_triton.pair_errors import PairErrors, pair_errors
from dpo.common.device import moved
from dpo.encode import Inputs
from dpo.models.dropout import Masks
from dpo.models.family import Denoise, Model, TextEncoding
from dpo.objective import Kto, Odds, PairTerms, pair_loss, sizes_of
from dpo.schedule import NoisePath


class Levels(NamedTuple):
    """The noise levels of one shape of latents, of a flow whose shift depends on it, and the tables that follow."""

    path: NoisePath
    weight: Tensor  # [T]
    precision: Tensor  # lambda [T] float64
    row: int  # of the corrections, whose first is that of PairStep's own path


@dataclass
class PairStep:
    """The forward of a micro-batch.

    Tables and scalars are device tensors: a captured CUDA graph would keep the value that a Python number had.
    """

    model: Model
    policy: Denoise
    reference: Denoise | None
    path: NoisePath
    weight: Tensor  # [T]
    beta: Tensor  # 0-d
    seed: Tensor  # 0-d int64
    scaling: tuple[Tensor, Tensor]  # shift and scale [C] of the latents: the denoiser sees (latents - shift) scale
    shaped: Mapping[tuple[int, int], Levels] = field(default_factory=dict)
    # (h, w) of latents whose noise levels depend on it -> what is theirs
    shape: str | None = "sigmoid"  # a name in objective.SHAPES; None: supervised
    sft_weight: float = 0.0
    alpha: float | None = None  # the shape's constant; None: its default
    norm_penalty: float = 0.0
    kto: Kto | None = None  # KTO's loss in the place of a pairwise one
    odds: Odds | None = None  # of MaPO, which has no pairwise loss
    safeguard: float | None = None  # margin of the bound on the losers' gradients; None: no bound
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float32  # of x_t: fp64 / bf16 where the weights are
    masks: Masks | None = None  # of dropout inside the adapters; None without

    def __call__(self, x: Inputs, correction: Tensor, recorded: Tensor | None = None) -> PairTerms:
        """The loss of each pair.

        correction [T]: DDE's C, or [1 + shapes, T]: that of each of `shaped` in its row; recorded [2, B] fp32: reference
        errors of win and lose.
        """
        found, t = self.errors(x, correction, recorded, wins_only=self.supervised)
        return pair_loss(
            found,
            x.prob,
            x.usable,
            t,
            shape=self.shape,
            sft_weight=self.sft_weight,
            alpha=self.alpha,
            safeguard=self.safeguard,
            odds=self.odds,
            norm_penalty=self.norm_penalty,
            kto=self.kto,
            single=x.single,
        )

    @property
    def supervised(self) -> bool:
        """Whether the preferred images alone are trained on."""
        return self.shape is None and self.odds is None and self.kto is None

    @property
    def timesteps(self) -> Tensor:
        """Those that are ever drawn, in any shape, ascending [K] int64."""
        return torch.cat([self.path.timesteps, *(one.path.timesteps for one in self.shaped.values())]).unique()

    def draw_from(self, timesteps: Tensor) -> None:
        """From now on draws from `timesteps` [K] int64, in every shape."""
        self.path = replace(self.path, timesteps=timesteps)
        self.shaped = {
            size: one._replace(path=replace(one.path, timesteps=timesteps)) for size, one in self.shaped.items()
        }

    def levels(self, x: Inputs) -> Levels | None:
        """The noise levels of latents of this shape; None where they are those of `path`."""
        return self.shaped.get((x.latent_mean.shape[2], x.latent_mean.shape[3]))

    def errors(
        self, x: Inputs, correction: Tensor, recorded: Tensor | None = None, *, wins_only: bool = False
    ) -> tuple[PairErrors, Tensor]:
        """Errors, difference and logit of each pair, and its timestep [B] int64.

        With `wins_only` the denoiser sees the preferred images alone, and the losers' errors are nan. Of images without a
        partner the error of the half that is not there means nothing; it is one number for policy and reference.
        """
        single = x.single
        x = x.filled() if single else x
        own = self.levels(x)
        path, weight = (self.path, self.weight) if own is None else (own.path, own.weight)
        if correction.ndim == 2:
            correction = correction[0 if own is None else own.row]
        t = path.draw(x.keys, x.draws, self.seed)
        latents = self.latents(x)
        x_t = noise_pairs(latents, t, path.signal, path.spread, x.keys, x.draws, self.seed, out_dtype=self.dtype)
        if self.masks is not None:
            self.masks.set(x.keys, x.draws, self.seed)
        told = path.told(t)
        half, other = t.numel(), 0.0 if single else torch.nan

        def predicted(denoise: Denoise, first: bool) -> Tensor:
            if not first:
                return self.predict(denoise, x_t, told.repeat(2), x.text.twice(), x.micro)
            wins = self.predict(denoise, x_t[:half], told, x.text, None if x.micro is None else x.micro[:half])
            return torch.cat([wins, torch.full_like(wins, other)])

        policy = predicted(self.policy, wins_only or single)
        reference = None
        if self.reference is not None and recorded is None:
            reference = predicted(self.reference, single)
        mixed = path.needs_data
        found = pair_errors(
            policy,
            t,
            x.prob,
            x.usable,
            weight,
            correction,
            self.beta,
            reference=reference,
            recorded=None if recorded is None else moved(recorded, t.device),
            noise=(x.keys, x.draws, self.seed),
            latents=latents if mixed else None,
            of_noise=path.of_noise if mixed else None,
            of_data=path.of_data if mixed else None,
        )
        if reference is not None:
            usable = (x.usable > 0).repeat(2).view(-1, 1, 1, 1)  # what a hole holds must not reach a gradient
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.norm_penalty > 0):
                sizes = sizes_of(*(torch.where(usable, p, 0.0) for p in (policy, reference)))
                found = found._replace(sizes=sizes[:, :half].repeat(1, 2) if single else sizes)
        return found, t

    def latents(self, x: Inputs) -> Tensor:
        """Keyed samples of the VAE's posterior, scaled as the denoiser expects them: [2B, C, h, w], fp32 or wider."""
        shift, scale = self.scaling
        wide = torch.promote_types(self.dtype, torch.float32)
        mean, std = x.latent_mean.to(wide), x.latent_std.to(wide)
        return sample_posterior(mean, std, x.keys, x.draws, self.seed, scale, shift)

    def predict(self, denoise: Denoise, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
        """The prediction [N, C, h, w] for noisy latents x_t [N, C, h, w] at timesteps t [N], under autocast."""
        text = text.to(x_t.device, self.autocast or x_t.dtype)  # a store's fp16 and bf16 do not mix under autocast
        with self._autocast():
            return denoise(x_t, t, text, sizes)

    def _autocast(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.weight.device.type, dtype=self.autocast)

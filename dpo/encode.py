"""From decoded pairs to the inputs of a training step: the text encoders and the VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dpo.common.device import moved
from dpo.data.batch import PairBatch
from dpo.models.family import Model, TextEncoding

# Takes a batch with pixels and its encoding: mean and std [2B, 4, h, w], encoded captions [B, ...].
Keep: TypeAlias = Callable[[PairBatch, Tensor, Tensor, tuple[Tensor, ...]], None]


class Inputs(NamedTuple):
    """B pairs on the training device. Of what has 2B rows, rows 0..B-1 are the preferred images, B..2B-1 the others."""

    keys: Tensor  # [B] int64 pair keys
    draws: Tensor  # [B] int64, the epoch
    prob: Tensor  # [B] fp32 in [0.5, 1]
    usable: Tensor  # [B] fp32, 0 for a hole: a pair with an image that cannot be used
    latent_mean: Tensor  # [2B, 4, h, w] VAE posterior, unscaled
    latent_std: Tensor  # [2B, 4, h, w]
    text: TextEncoding  # [B, ...]
    micro: Tensor | None  # [2B, 6] int64, SDXL's size and crop of each image

    def to(self, device: torch.device | str) -> Inputs:
        """The same pairs on another device."""
        there = {name: moved(value, device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**there, text=self.text.to(device))


@dataclass
class Encoder:
    """Text encoders and VAE, without gradient, in their own dtype; with `offload` they are on the CPU between calls."""

    model: Model
    device: torch.device
    vae_batch: int
    offload: bool = False
    zero_dropped: bool = False  # a dropped caption is zeros, not the encoding of the empty one
    keep: Keep | None = None  # takes what was encoded, so that it need not be encoded again

    def _place(self, modules: Sequence[nn.Module], busy: bool) -> None:
        for module in modules:
            module.to(self.device if busy or not self.offload else "cpu")

    def _dtype(self, module: nn.Module) -> torch.dtype:
        return next(module.parameters()).dtype

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, 3, H, W] uint8 -> mean and std of the VAE's posterior [N, 4, h, w] in its dtype, unscaled.

        Pixels are scaled to [-1, 1] in fp32 or wider and rounded once: in bf16 the division and the difference would
        round too, always the same way, by an eighth of a grey level on average.
        """
        vae = self.model.vae
        self._place([vae], busy=True)
        dtype = self._dtype(vae)
        wide = torch.promote_types(dtype, torch.float32)
        means, stds = [], []
        for part in pixels.split(self.vae_batch):
            x = moved(part, self.device).to(wide) / 127.5 - 1
            posterior = vae.encode(x.to(dtype)).latent_dist
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

    def inputs(self, batch: PairBatch) -> Inputs:
        """A PairBatch -> Inputs on the device.

        A batch with pixels is encoded; one from a prepared store is only moved.
        """
        if batch.latent_mean is not None:
            assert batch.latent_std is not None and batch.text is not None, "a store has them all"
            mean, std = self._moved(batch.latent_mean), self._moved(batch.latent_std)
            text = TextEncoding(*batch.text).to(self.device)
        else:
            assert batch.pixels is not None, "images, or what a store has of them"
            (mean, std), text = self.posterior(batch.pixels), self.text(batch.captions)
            if self.keep is not None:
                self.keep(batch, mean, std, tuple(x for x in text if x is not None))
        if self.zero_dropped:
            text = text.zero_where(self._moved(batch.dropped))
        return Inputs(
            keys=self._moved(batch.keys),
            draws=self._moved(batch.draws),
            prob=self._moved(batch.prob),
            usable=self._moved(batch.usable),
            latent_mean=mean,
            latent_std=std,
            text=text,
            micro=self._moved(batch.micro),
        )

    def _moved(self, x: Tensor) -> Tensor:
        return moved(x, self.device)

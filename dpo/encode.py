"""From decoded pairs to the inputs of a training step: the text encoders and the VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dpo.common.cores import Cores
from dpo.common.device import moved
from dpo.data.batch import PairBatch
from dpo.models.family import Model, TextEncoding

# Takes a batch with pixels and its encoding: mean and std [2B, 4, h, w], encoded captions [B, ...].
Keep: TypeAlias = Callable[[PairBatch, Tensor, Tensor, TextEncoding], None]

TOGETHER = 64  # pairs that share a trip of the encoders; what is encoded of SDXL's takes 1 MB each


class Inputs(NamedTuple):
    """B pairs on the training device. Of what has 2B rows, rows 0..B-1 are the preferred images, B..2B-1 the others.

    Of B images without a partner it has B rows, and `prob` is the probability that an image is liked.
    """

    keys: Tensor  # [B] int64 pair keys
    draws: Tensor  # [B] int64, the epoch
    prob: Tensor  # [B] fp32 in [0.5, 1]; of images alone in [0, 1]
    usable: Tensor  # [B] fp32, 0 for a hole: a pair with an image that cannot be used
    latent_mean: Tensor  # [2B, 4, h, w] VAE posterior, unscaled
    latent_std: Tensor  # [2B, 4, h, w]
    text: TextEncoding  # [B, ...]
    micro: Tensor | None  # [2B, 6] int64, SDXL's size and crop of each image

    def to(self, device: torch.device | str) -> Inputs:
        """The same pairs on another device."""
        there = {name: moved(value, device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**there, text=self.text.to(device))

    @property
    def single(self) -> bool:
        """Whether these are images without a partner."""
        return len(self.latent_mean) == len(self.keys)

    def filled(self) -> Inputs:
        """Images without a partner with zeros in the place of their partners' latents, for kernels that take 2B rows."""

        def twice(x: Tensor) -> Tensor:
            return torch.cat([x, torch.zeros_like(x)])

        micro = None if self.micro is None else twice(self.micro)
        return self._replace(latent_mean=twice(self.latent_mean), latent_std=twice(self.latent_std), micro=micro)


@dataclass
class Encoder:
    """Text encoders and VAE, without gradient, in their own dtype; with `offload` they are on the CPU between calls.

    A trip to the device and back moves all their weights, so `encoded` makes one for TOGETHER pairs, each micro-batch in a
    call of its own all the same: its bits are those without.
    """

    model: Model
    device: torch.device
    vae_batch: int
    offload: bool = False
    zero_dropped: bool = False  # a dropped caption is zeros, not the encoding of the empty one
    keep: Keep | None = None  # takes what was encoded, so that it need not be encoded again
    cores: Cores | None = None  # which share the VAE's calls
    placed: list[nn.Module] = field(default_factory=list)  # on the device just now

    @contextmanager
    def _placed(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside the block the modules are on the device; a block inside the block changes nothing."""
        travelling = [module for module in modules if module not in self.placed]
        self._place(travelling, busy=True)
        self.placed += travelling
        try:
            yield
        finally:
            self.placed = [module for module in self.placed if module not in travelling]
            self._place(travelling, busy=False)

    def _place(self, modules: Sequence[nn.Module], busy: bool) -> None:
        for module in modules:
            module.to(self.device if busy or not self.offload else "cpu")

    def _dtype(self, module: nn.Module) -> torch.dtype:
        return next(module.parameters()).dtype

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [N, 3, H, W] uint8 -> mean and std of the VAE's posterior [N, C, h, w] in its dtype, unscaled.

        Pixels are scaled to [-1, 1] in fp32 or wider and rounded once: in bf16 the division and the difference would
        round too, always the same way, by an eighth of a grey level on average.
        """
        vae = self.model.vae
        with self._placed([vae]):
            dtype = self._dtype(vae)
            wide = torch.promote_types(dtype, torch.float32)

            def of_part(part: Tensor) -> tuple[Tensor, Tensor]:
                x = moved(part, self.device).to(wide) / 127.5 - 1
                return self.model.family.posterior(vae, x.to(dtype))

            means, stds = zip(*(self.cores or map)(of_part, pixels.split(self.vae_batch)), strict=True)
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def text(self, captions: list[str]) -> TextEncoding:
        """B captions -> their encoding [B, ...]."""
        with self._placed(self.model.text_encoders):
            return self.model.family.encode(self.model, captions)

    def inputs(self, batch: PairBatch) -> Inputs:
        """A PairBatch -> Inputs on the device.

        A batch with pixels is encoded; one from a prepared store is only moved.
        """
        return self._inputs(batch, None if batch.pixels is None else self.text(batch.captions))

    def encoded(self, batches: Iterable[PairBatch]) -> Iterator[tuple[PairBatch, Inputs]]:
        """Each batch with its `inputs`. With `offload` up to TOGETHER pairs of an update are read and encoded ahead."""
        for group in self._groups(batches):
            if len(group) == 1:
                yield group[0], self.inputs(group[0])
                continue
            with self._placed(self.model.text_encoders):
                texts = [None if batch.pixels is None else self.text(batch.captions) for batch in group]
            with self._placed([self.model.vae]):
                found = [self._inputs(batch, text) for batch, text in zip(group, texts, strict=True)]
            yield from zip(group, found, strict=True)

    def _groups(self, batches: Iterable[PairBatch]) -> Iterator[list[PairBatch]]:
        group: list[PairBatch] = []
        for batch in batches:
            group.append(batch)
            travels = self.offload and batch.pixels is not None
            if not travels or batch.last or sum(map(len, group)) + len(batch) > TOGETHER:
                yield group
                group = []
        if group:
            yield group

    def _inputs(self, batch: PairBatch, text: TextEncoding | None) -> Inputs:
        """text: of the captions of a batch with pixels."""
        if batch.latent_mean is not None:
            assert batch.latent_std is not None and batch.text is not None, "a store has them all"
            mean, std = self._moved(batch.latent_mean), self._moved(batch.latent_std)
            text = TextEncoding(*batch.text).to(self.device)
        else:
            assert batch.pixels is not None and text is not None, "images, or what a store has of them"
            mean, std = self.posterior(batch.pixels)
            if self.keep is not None:
                self.keep(batch, mean, std, text)
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

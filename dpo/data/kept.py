"""Encoded pairs kept in host memory after their first use: from the second epoch no image is read, decoded or encoded.

Legend: B pairs of a micro-batch; h, w of latents. A micro-batch comes from memory where all its pairs are kept. The
others are decoded and encoded as ever, and compared with what is kept of them: a batch of other pairs could change the
last bits of an encoding. Nothing is taken from memory before CHECKED pairs came out equal to the bit, and nothing once
one did not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo.common import machine
from dpo.common.command import of_launcher
from dpo.data.batch import Decoding, PairBatch, drops, mirrors
from dpo.data.order import Place
from dpo.data.pairs import Source, things
from dpo.data.store.files import Parts, each
from dpo.settings.config import Data, Runtime

CHECKED = 16  # pairs
SHARE = 0.25  # of the free host memory

log = logging.getLogger("dpo")


class _Told(NamedTuple):
    """What is known of a pair without its images."""

    key: int
    prob: float
    bad: str | None  # why it is a hole


class _Images(NamedTuple):
    """The preferred image and the other one, of one pair; or one image alone, and then 1 in the place of 2."""

    mean: Tensor  # [2, 4, h, w] VAE posterior, unscaled
    std: Tensor  # [2, 4, h, w]
    micro: Tensor  # [2, 6] int64


class _Copy(NamedTuple):
    """An encoded micro-batch on its way to the host."""

    arrived: Callable[[], bool]
    batch: PairBatch
    mean: Tensor
    std: Tensor
    text: Parts


@dataclass
class Kept:
    """The encoded pairs of a source, by their index in it. Filled by the training loop, read by any thread."""

    pairs: int  # of the source
    captions: int  # different ones, the empty one included where captions are dropped
    decoding: Decoding
    free: int  # bytes of host memory that this process may take a SHARE of
    things: str = "pairs"  # or images, in words
    served: int = 0  # pairs taken from memory since `take`
    full: bool = False  # whether nothing more is kept: it does not fit, or encoding anew gives other bits
    _agreed: int = 0  # pairs that were encoded again and came out equal
    # Of an encoded micro-batch, by height and width of its latents: sums depend on the layout.
    _strides: dict[torch.Size, list[tuple[int, ...]]] = field(default_factory=dict)
    _told: dict[int, _Told] = field(default_factory=dict)
    _caption: dict[int, str] = field(default_factory=dict)  # of the pairs that came with theirs
    _images: dict[tuple[int, bool], _Images] = field(default_factory=dict)  # by (index, whether mirrored)
    _text: dict[str, Parts] = field(default_factory=dict)
    _copies: list[_Copy] = field(default_factory=list)

    def has(self, indices: Sequence[int], epochs: Sequence[int]) -> bool:
        """Whether the micro-batch of these pairs [B] in these epochs [B] comes from memory."""
        if self.full or self._agreed < min(CHECKED, self.pairs):
            return False
        if any(index not in self._told for index in indices):
            return False
        mirrored, dropped = self._drawn(indices, epochs)
        return all(
            (index, mirror) in self._images and (self._caption.get(index) if not drop else "") in self._text
            for index, mirror, drop in zip(indices, mirrored, dropped, strict=True)
        )

    def batch(self, place: Place) -> PairBatch:
        """The micro-batch at this place, for whose pairs `has` was true: as encoded before, without pixels."""
        indices, epochs = place.indices, place.epochs
        mirrored, dropped = self._drawn(indices, epochs)
        told = [self._told[index] for index in indices]
        images = [self._images[index, mirror] for index, mirror in zip(indices, mirrored, strict=True)]
        captions = ["" if drop else self._caption[index] for index, drop in zip(indices, dropped, strict=True)]
        self.served += place.pairs
        usable = place.usable() * torch.tensor([float(pair.bad is None) for pair in told])
        prob = torch.tensor([pair.prob for pair in told], dtype=torch.float32)

        def both(of: int) -> Tensor:
            return torch.stack([item[of] for item in images], dim=1).flatten(0, 1)  # [2B, ...], preferred ones first

        mean, std = both(0), both(1)
        texts = [self._text[caption] for caption in captions]
        hidden, pooled, mask = zip(*texts, strict=True)
        text: Parts = torch.stack(hidden), _stacked(pooled), _stacked(mask)
        strides = iter(self._strides[images[0].mean.shape[-2:]])

        def as_encoded(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, next(strides), dtype=x.dtype).copy_(x)

        mean, std, text = as_encoded(mean), as_encoded(std), each(text, as_encoded)
        return PairBatch(
            keys=torch.tensor([pair.key for pair in told], dtype=torch.int64),
            draws=torch.tensor(epochs, dtype=torch.int64),
            prob=torch.where(usable > 0, prob, torch.full_like(prob, 0.5)),
            usable=usable,
            captions=captions,
            dropped=torch.tensor(dropped),
            micro=both(2),
            position=place.position,
            epoch=epochs[0],
            latent_mean=mean,
            latent_std=std,
            text=text,
            bad=tuple((pair.key, pair.bad) for pair in told[: place.pairs] if pair.bad is not None),
            last=place.last,
        )

    def take(self) -> int:
        """Pairs taken from memory since the last call."""
        served, self.served = self.served, 0
        return served

    @torch.no_grad()
    def put(self, batch: PairBatch, mean: Tensor, std: Tensor, text: Parts) -> None:
        """Keeps a micro-batch that was decoded, with its encoding: mean and std [2B, 4, h, w], text [B, ...].

        The host does not wait for a GPU: a copy is kept by a later call, once it has arrived.
        """
        if self.full or batch.indices is None:
            return
        if not self._strides:
            self._size(len(batch), (mean, std), text)
        self._strides.setdefault(mean.shape[-2:], [x.stride() for x in (mean, std, *text) if x is not None])
        if not self.full:
            # From a GPU into page-locked memory, without waiting: nothing reads it before the event behind it is there.
            mean, std = (x.to("cpu", non_blocking=x.is_cuda) for x in (mean, std))
            words = each(text, lambda x: x.to("cpu", non_blocking=x.is_cuda))
            self._copies.append(_Copy(_arrival(mean), batch, mean, std, words))
        while self._copies and self._copies[0].arrived():
            self._keep(self._copies.pop(0))

    def _size(self, pairs: int, latents: Sequence[Tensor], text: Parts) -> None:
        """Decides whether the whole set fits, from one micro-batch, and says so."""
        image = sum(x.nbytes for x in latents) / pairs * (2 if self.decoding.flip else 1)
        size = int(self.pairs * image + self.captions * sum(x.nbytes for x in text if x is not None) / pairs)
        self.full = size > SHARE * self.free
        said = f"{self.pairs} encoded {self.things} take {size / 2**20:,.0f} MiB, {size / max(self.free, 1):.2g} of the free memory"
        if self.full:
            log.info(
                "%s, more than %g: they are encoded anew in each epoch (python -m dpo.prepare keeps them on disk)",
                said,
                SHARE,
            )
        else:
            log.info("%s: kept from their first use, no image is read twice (--keep-encoded off refuses)", said)

    def _keep(self, copy: _Copy) -> None:
        batch, half = copy.batch, len(copy.batch)
        assert batch.indices is not None, "put looks"
        bad = dict(batch.bad)
        mirrored, _ = self._drawn(batch.indices, batch.draws.tolist(), batch.keys)
        for i, (index, mirror) in enumerate(zip(batch.indices, mirrored, strict=True)):
            key, rows = int(batch.keys[i]), list(range(i, len(batch.micro), half))
            if not batch.usable[i] and key not in bad:
                continue  # a hole of the order, or made after decoding: the images are not what was encoded
            told = _Told(key, float(batch.prob[i]), bad.get(key))
            known = self._told.setdefault(index, told)
            if (known.bad is None) != (told.bad is None):
                continue  # an image came or went since its first use: the first is what is kept
            images = _Images(copy.mean[rows], copy.std[rows], batch.micro[rows])
            text, caption = each(copy.text, lambda x, i=i: x[i]), batch.captions[i]  # type: ignore[misc]
            before = self._images.get((index, mirror)), self._text.get(caption)
            if not (_same(before[0], images) and _same(before[1], text)):
                return self._give_up()
            self._agreed += before[0] is not None
            if before[1] is None:
                self._text[caption] = each(text, torch.Tensor.clone)
            if before[0] is None:
                self._images[index, mirror] = images
            if not batch.dropped[i]:
                self._caption[index] = caption

    def _give_up(self) -> None:
        """Nothing more comes from memory. What other threads were promised stays."""
        promised = self._agreed >= min(CHECKED, self.pairs)
        self.full = True
        self._copies.clear()
        if not promised:
            self._images.clear()
            self._text.clear()
        log.warning(
            "encoded %s are no longer kept: one encoded again came out different (an image was changed, or on this device "
            "the last bits depend on the others of a micro-batch)",
            self.things,
        )

    def _drawn(
        self, indices: Sequence[int], epochs: Sequence[int], keys: Tensor | None = None
    ) -> tuple[list[bool], list[bool]]:
        """Which of these pairs are mirrored, and which captions dropped, in these epochs."""
        if keys is None:
            keys = torch.tensor([self._told[index].key for index in indices], dtype=torch.int64)
        draws = torch.tensor(epochs, dtype=torch.int64)
        return mirrors(keys, draws, self.decoding), drops(keys, draws, self.decoding)


def keeping(data: Data, runtime: Runtime, source: Source, micro_batch: int, ahead: int) -> Kept | None:
    """An empty memory for the decided settings; None where nothing is kept, which is said where it could have helped.

    micro_batch: its pairs; ahead: pairs that the rest of the run takes. In a run of one epoch none comes twice.
    """
    if ahead <= len(source):
        return None
    if data.crop == "random":
        log.info("images are encoded anew in each epoch: crop = random cuts another square of each")
    if runtime.keep_encoded != "on":
        return None
    images = source.sides * micro_batch
    if leaves_rest(runtime, images):
        log.info(
            "images are encoded anew in each epoch: --vae-batch %d does not divide the %d images of a micro-batch",
            runtime.vae_batch,
            images,
        )
        return None
    captions = len(np.unique(source.caption_keys())) + (data.caption_dropout > 0)
    free = machine.free_memory() // of_launcher("LOCAL_WORLD_SIZE", 1)
    return Kept(len(source), captions, Decoding.of(data, runtime.seed), free, things(source))


def leaves_rest(runtime: Runtime, images: int) -> bool:
    """Whether the VAE's calls for a micro-batch of so many images differ in size: tried, a rest has other last bits."""
    return images > runtime.vae_batch and images % runtime.vae_batch > 0


def _arrival(x: Tensor) -> Callable[[], bool]:
    """Tells whether what was copied so far from the device of `x` has arrived."""
    if x.device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    return event.query


def _same(before: tuple | None, now: tuple) -> bool:
    """Whether tensors on the host are equal to the bit; also where there are none to compare with."""
    return before is None or all(np.array_equal(_bits(a), _bits(b)) for a, b in zip(before, now, strict=True))


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """A part of several captions, where it is there."""
    there = [row for row in rows if row is not None]
    return torch.stack(there) if there else None


def _bits(x: Tensor | None) -> np.ndarray:
    return np.empty(0) if x is None else x.contiguous().view(torch.uint8).numpy()

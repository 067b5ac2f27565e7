"""A micro-batch of pairs on the CPU, as the data side hands it to the encoders, and decoding one from image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csrc_triton.philox import Stream, uniform
from dpo.common.words import excerpt
from dpo.data.images import fitted, unreadable
from dpo.data.labels import SAME
from dpo.data.order import Place
from dpo.data.pairs import MAX_MIB, BadImage, Pair, embedded_twice
from dpo.data.store.files import Parts, each
from dpo.settings.config import Data

BY_VALUE = 1 << 14  # bytes; larger tensors travel between processes in shared memory


@dataclass
class PairBatch:
    """B pairs on the CPU; of everything with 2B rows the first B are the preferred images.

    Of B images without a partner it has B rows, and `prob` in [0, 1] is the probability that an image is liked.
    A hole (a pair with an image that cannot be used) keeps its place, with usable 0, prob 0.5 and black pixels; `bad`
    says why. So does one that makes up for pairs of its shape that an update lacks, without a reason. A batch has either
    pixels or, from a prepared store, latents and encoded text; the other fields are None.
    """

    keys: Tensor  # [B] int64
    draws: Tensor  # [B] int64, the epoch of each pair
    prob: Tensor  # [B] fp32 in [0.5, 1]
    usable: Tensor  # [B] fp32, 1 or 0
    captions: list[str]  # dropout already applied
    dropped: Tensor  # [B] bool, whether it was
    micro: Tensor  # [2B, 6] int64, pixels: original height, width, crop top, left, target height, width
    position: int  # of the first pair in the whole run
    epoch: int  # of the first pair
    pixels: Tensor | None = None  # [2B, 3, H, W] uint8
    latent_mean: Tensor | None = None  # [2B, 4, h, w] of the VAE's posterior, unscaled
    latent_std: Tensor | None = None  # [2B, 4, h, w]
    text: Parts | None = None  # encoded captions [B, ...]
    recorded: Tensor | None = None  # [2, B] fp32: the reference's errors of win and lose, recorded beforehand
    bad: tuple[tuple[int, str], ...] = ()  # (key, what is wrong) of each hole
    indices: list[int] | None = None  # [B] in the source, where the encoded pairs may be kept
    last: bool = False  # whether it is the last one of an update, in this process

    def __len__(self) -> int:
        return len(self.captions)

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors travel between processes as arrays: each shared one costs a file handle and a handshake."""
        small = {k: v.numpy() for k, v in vars(self).items() if isinstance(v, Tensor) and v.nbytes <= BY_VALUE}
        return vars(self) | small

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update((k, torch.from_numpy(v) if isinstance(v, np.ndarray) else v) for k, v in state.items())

    def pin_memory(self) -> PairBatch:
        """Moves the tensors to page-locked memory (called by the DataLoader's own thread); the same batch."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                setattr(self, item.name, value.pin_memory())
        if self.text is not None:
            self.text = each(self.text, Tensor.pin_memory)
        return self


def of_update(batches: Iterable[PairBatch]) -> Iterator[PairBatch]:
    """The micro-batches of the next update."""
    for batch in batches:
        yield batch
        if batch.last:
            return


@dataclass(frozen=True)
class Decoding:
    """How images become pixels; everything random is a function of (seed, pair key, draw)."""

    resolution: int  # pixels of a side, where a micro-batch has no size of its own
    seed: int
    crop: str = "center"
    flip: bool = False
    caption_dropout: float = 0.0
    max_mib: int = MAX_MIB  # of an image file

    @classmethod
    def of(cls, data: Data, seed: int) -> Decoding:
        """From the settings, once the resolution is decided."""
        assert data.resolution is not None, "the resolution is decided before a batch is read"
        return cls(data.resolution, seed, data.crop, data.flip, data.caption_dropout, data.max_image_mib)


def _keyed(keys: Tensor, draws: Tensor, stream: Stream, seed: int, count: int, wanted: bool) -> list[list[float]]:
    return uniform(keys, draws, stream, seed, count).tolist() if wanted else [[0.5] * count] * len(keys)


def mirrors(keys: Tensor, draws: Tensor, decoding: Decoding) -> list[bool]:
    """Which of the pairs with these keys [B] int64 are mirrored in these draws [B] int64."""
    return [flip < 0.5 for (flip,) in _keyed(keys, draws, Stream.FLIP, decoding.seed, 1, decoding.flip)]


def drops(keys: Tensor, draws: Tensor, decoding: Decoding) -> list[bool]:
    """Which of the captions of the pairs with these keys [B] int64 are dropped in these draws [B] int64."""
    share = decoding.caption_dropout
    return [drop < share for (drop,) in _keyed(keys, draws, Stream.DROPOUT, decoding.seed, 1, share > 0)]


def decode_batch(pairs: Sequence[Pair], place: Place, decoding: Decoding) -> PairBatch:
    """Reads and decodes the images of the B pairs of a micro-batch that stands at `place`.

    An image that cannot be used leaves a hole, never an exception. Nothing is read of the holes that `place` has.
    """
    keys = torch.tensor([pair.key for pair in pairs], dtype=torch.int64)
    draw = torch.tensor(place.epochs, dtype=torch.int64)

    crops = _keyed(keys, draw, Stream.CROP, decoding.seed, 4, decoding.crop == "random")
    mirrored, dropped = mirrors(keys, draw, decoding), drops(keys, draw, decoding)
    size = place.size or (decoding.resolution, decoding.resolution)
    images = sum(len(pair.images) for pair in pairs)
    pixels = torch.zeros(images, 3, *size, dtype=torch.uint8)
    whole = torch.tensor([*size, 0, 0, *size], dtype=torch.int64)
    micro = whole.repeat(images, 1)
    usable = place.usable()
    bad = []
    for i, (pair, mirror, crop) in enumerate(zip(pairs[: place.pairs], mirrored, crops, strict=False)):
        places = list(zip(range(i, images, len(pairs)), pair.images, (crop[:2], crop[2:])))
        if embedded_twice(pair):
            usable[i] = 0.0
            bad.append((pair.key, f"{SAME}, of {excerpt(pair.caption)}"))
            continue
        for row, image, uniforms in places:
            try:
                pixels[row], numbers = fitted(image.load(decoding.max_mib), size, decoding.crop, uniforms, mirror)
            except BadImage as error:
                usable[i] = 0.0
                bad.append((pair.key, unreadable(image, pair.caption, error)))
                break
            micro[row] = torch.tensor(numbers)
        if not usable[i]:
            for row, _, _ in places:
                pixels[row] = 0
                micro[row] = whole
    prob = torch.tensor([pair.prob for pair in pairs], dtype=torch.float32)
    return PairBatch(
        keys=keys,
        draws=draw,
        prob=torch.where(usable > 0, prob, torch.full_like(prob, 0.5)),
        usable=usable,
        captions=["" if drop else pair.caption for pair, drop in zip(pairs, dropped, strict=True)],
        dropped=torch.tensor(dropped),
        micro=micro,
        position=place.position,
        epoch=place.epochs[0],
        pixels=pixels,
        bad=tuple(bad),
        last=place.last,
    )

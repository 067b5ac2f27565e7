"""Micro-batches of a prepared store, read by one thread ahead of the training loop."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch import Tensor

from csrc_triton.philox import Stream, uniform
from dpo.data.ahead import read_ahead
from dpo.data.batch import Decoding, PairBatch
from dpo.data.images import Size
from dpo.data.order import Place
from dpo.data.pairs import caption_key, smoothed
from dpo.data.store.files import LATENTS
from dpo.data.store.recorded import RecordedErrors
from dpo.data.store.store import StoreSource

READ_AHEAD = 4  # batches
EMPTY = caption_key("")  # the caption that stands for a dropped one


def read(
    store: StoreSource, places: Iterable[Place], decoding: Decoding, recorded: RecordedErrors | None = None
) -> Generator[PairBatch, None, None]:
    """The micro-batches at `places`, in order; closing the generator ends the thread that reads ahead.

    Resolution and crop were decided when the store was filled: of `decoding`, seed, flip and caption dropout are used.
    Raises DamagedStore.
    """
    reader, pin = _Reader(store, decoding, recorded), torch.cuda.is_available()
    made = (reader.batch(place) for place in places)
    stream = read_ahead((batch.pin_memory() if pin else batch for batch in made), READ_AHEAD)
    try:
        yield from stream
    finally:
        stream.close()


class _Reader:
    """Reads batches of a store; everything random is a function of (seed, pair key, draw), as when images are read."""

    def __init__(self, store: StoreSource, decoding: Decoding, recorded: RecordedErrors | None) -> None:
        self.store, self.decoding, self.recorded = store, decoding, recorded
        self.empty = int(np.flatnonzero(store.contents.caption_hash == EMPTY)[0])

    def batch(self, place: Place) -> PairBatch:
        """The micro-batch at this place, of B pairs."""
        store, inside = self.store, self.store.contents
        pairs = store.pairs[np.asarray(place.indices)]
        keys, epoch = torch.from_numpy(inside.key[pairs]), torch.tensor(place.epochs, dtype=torch.int64)
        draws = epoch if self.recorded is None else self.recorded.draws(keys, epoch)
        usable = torch.from_numpy((inside.win[pairs] >= 0) & (inside.lose[pairs] >= 0)) & place.usable().bool()
        prob = torch.from_numpy(inside.prob[pairs])
        for hard in (0.0, 1.0):
            prob = torch.where(prob == hard, torch.tensor(smoothed(hard, store.smoothing), dtype=torch.float32), prob)
        images = [int(row) for row in np.concatenate([inside.win[pairs], inside.lose[pairs]][: store.sides])]
        images = [row if usable[i % len(pairs)] else -1 for i, row in enumerate(images)]
        captions = [int(row) for row in inside.caption[pairs]]
        dropped = torch.zeros(len(pairs), dtype=torch.bool)
        if self.decoding.caption_dropout > 0:
            dropped = uniform(keys, draws, Stream.DROPOUT, self.decoding.seed, 1)[:, 0] < self.decoding.caption_dropout
            captions = [self.empty if drop else row for row, drop in zip(captions, dropped.tolist(), strict=True)]
        mean, std = self._latents(images, keys, draws, place.size)
        return PairBatch(
            keys=keys,
            draws=draws,
            prob=torch.where(usable, prob, torch.full_like(prob, 0.5)),
            usable=usable.float(),
            captions=[inside.text(row) for row in captions],
            dropped=dropped,
            micro=inside.micro(images, place.size),
            position=place.position,
            epoch=int(epoch[0]),
            latent_mean=mean,
            latent_std=std,
            text=inside.encoded(captions),
            recorded=None if self.recorded is None else self.recorded.errors(pairs, draws),
            last=place.last,
        )

    def _latents(self, images: list[int], keys: Tensor, draws: Tensor, size: Size | None) -> tuple[Tensor, Tensor]:
        """Mean and std [2B, C, h, w] of the images ([B] of images alone); with `decoding.flip` half of the pairs (keyed) are mirrored."""
        inside = self.store.contents
        if not self.decoding.flip:
            mean, std = inside.latents(LATENTS[:2], images, size)
            return mean, std
        found = inside.latents(LATENTS, images, size)
        mirrored = (uniform(keys, draws, Stream.FLIP, self.decoding.seed, 1)[:, 0] < 0.5).repeat(self.store.sides)
        mirrored = mirrored.view(-1, 1, 1, 1)
        return torch.where(mirrored, found[2], found[0]), torch.where(mirrored, found[3], found[1])

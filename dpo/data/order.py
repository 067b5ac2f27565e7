"""The order of an epoch: a pure function of (seed, epoch) and of how the pairs are stored.

Every pair gets a time, and the pairs are read in the order of their times. Where pairs can be read one by one, the time
is a keyed uniform number and the order a uniform permutation. Parquet can only be read a row group at a time
(Pick-a-Pic v2: hundreds of megabytes), so there the row groups are permuted and a pair's time is

    (place of its row group among the permuted row groups) + window * (keyed uniform number in [0, 1))

At any moment only the last `window` row groups are in use, each is read once an epoch, and the reads are spread evenly.
The price: pairs of one row group stay within `window` row groups of each other. Sets that fit in memory as a whole
(`parquet.WINDOW_BYTES`) are permuted uniformly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from csrc_triton.philox import Stream, random_bits
from dpo.data.buckets import Buckets
from dpo.data.images import Size
from dpo.data.pairs import Source

CHUNK = 1 << 16  # keys


def _uniform(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Keyed numbers in [0, 1) with 53 bits for int64 keys [n] -> fp64 [n]."""
    out = np.empty(len(keys), dtype=np.float64)
    for begin in range(0, len(keys), CHUNK):
        part = torch.from_numpy(keys[begin : begin + CHUNK])
        bits = random_bits(part, torch.full_like(part, epoch), Stream.ORDER, seed, 2)
        out[begin : begin + CHUNK] = ((bits[:, 0] << 21) | (bits[:, 1] >> 11)).numpy() * 2.0**-53
    return out


def epoch_order(
    n: int, seed: int, epoch: int, groups: np.ndarray | None = None, window: int | None = None
) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n].

    groups [n] int32: the unit of reading (row group) of each pair; window: how many units may be open at once. Without
    both the permutation is uniform.
    """
    time = _uniform(np.arange(n, dtype=np.int64), seed, epoch)
    if groups is not None and window is not None:
        present, member = np.unique(groups, return_inverse=True)
        place = np.empty(len(present), dtype=np.int64)
        place[np.argsort(_uniform(-1 - present.astype(np.int64), seed, epoch), kind="stable")] = np.arange(len(present))
        time = place[member] + window * time
    return np.argsort(time, kind="stable")


@dataclass(frozen=True)
class Order:
    """Which pairs of a run come in which micro-batch. A position counts the pairs of the whole run, from 0.

    Position g is pair epoch_order(n, seed, g // n)[g % n] in epoch g // n; a batch may span the end of an epoch. Of
    `world` processes, process `rank` gets every world-th batch.

    With `buckets` a micro-batch has pairs of one shape. An update has the pairs that it has without, sorted by shape,
    and holes where a shape does not fill its last micro-batch, or a process has none in the update's last round.
    """

    seed: int
    start: int  # the first position: pairs consumed so far
    micro_batch: int  # pairs
    stop: int | None = None  # the position after the last; None: endless
    rank: int = 0
    world: int = 1
    update: int | None = None  # pairs of an update of all processes, where updates are made
    buckets: Buckets | None = None


class Place(NamedTuple):
    """Where a micro-batch stands in a run, and its pairs."""

    position: int  # of its first pair
    indices: list[int]  # [B] in the source
    epochs: list[int]  # [B]
    filled: int | None = None  # pairs; the rest of B are holes in the place of others. None: all
    size: Size | None = None  # of its images; None: the native square
    last: bool = False  # whether it is the last one of an update, in this process

    @property
    def pairs(self) -> int:
        """Its pairs without such holes."""
        return len(self.indices) if self.filled is None else self.filled

    def usable(self) -> torch.Tensor:
        """[B] fp32: 1, and 0 for its holes."""
        return (torch.arange(len(self.indices)) < self.pairs).float()


def run_order(source: Source, order: Order) -> Iterator[Place]:
    """The places of this process's micro-batches, one after another."""
    if order.buckets is not None:
        yield from _by_bucket(source, order, order.buckets)
        return
    at, each = _reader(source, order.seed), order.world * order.micro_batch
    position = order.start + order.rank * order.micro_batch
    while order.stop is None or position < order.stop:
        end = position + order.micro_batch
        if order.stop is not None:
            end = min(end, order.stop)
        indices, epochs = at(position, end)
        done = position - order.rank * order.micro_batch - order.start + each
        yield Place(position, indices, epochs, last=order.update is not None and done % order.update == 0)
        position += each


def _reader(source: Source, seed: int) -> Callable[[int, int], tuple[list[int], list[int]]]:
    """A function from a stretch of positions to the indices and the epochs of their pairs."""
    n, epoch, permutation = len(source), -1, np.empty(0, dtype=np.int64)

    def read(begin: int, end: int) -> tuple[list[int], list[int]]:
        nonlocal epoch, permutation
        indices, epochs = [], []
        for g in range(begin, end):
            if g // n != epoch:
                epoch = g // n
                permutation = epoch_order(n, seed, epoch, source.groups, source.window)
            indices.append(int(permutation[g % n]))
            epochs.append(epoch)
        return indices, epochs

    return read


def _by_bucket(source: Source, order: Order, buckets: Buckets) -> Iterator[Place]:
    assert order.update is not None, "what is sorted by shape are the pairs of an update"
    at, size = _reader(source, order.seed), order.micro_batch
    for begin in itertools.count(order.start, order.update):
        if order.stop is not None and begin >= order.stop:
            return
        end = begin + order.update if order.stop is None else min(begin + order.update, order.stop)
        places = [_padded(place, size) for place in _sorted(begin, *at(begin, end), buckets, size)]
        rounds = -(-len(places) // order.world)
        places += [places[-1]._replace(filled=0)] * (rounds * order.world - len(places))
        for number in range(rounds):
            yield places[number * order.world + order.rank]._replace(last=number == rounds - 1)


def _sorted(
    begin: int, indices: Sequence[int], epochs: Sequence[int], buckets: Buckets, micro_batch: int
) -> Iterator[Place]:
    """Pairs that lie at positions from `begin` on, in micro-batches of one shape each; the last of a shape may be short."""
    bucket = buckets.of[np.asarray(indices)]
    for number in np.unique(bucket).tolist():
        rows = np.flatnonzero(bucket == number).tolist()
        for first in range(0, len(rows), micro_batch):
            mine = rows[first : first + micro_batch]
            held = [indices[row] for row in mine], [epochs[row] for row in mine]
            yield Place(begin + mine[0], *held, filled=len(mine), size=buckets.sizes[number])


def _padded(place: Place, micro_batch: int) -> Place:
    """A micro-batch of full length, whose holes stand in the place of its first pair: kernels and last bits are the same."""
    more = micro_batch - len(place.indices)
    return place._replace(
        indices=place.indices + place.indices[:1] * more, epochs=place.epochs + place.epochs[:1] * more
    )


def stored_order(
    source: Source, micro_batch: int, rank: int = 0, world: int = 1, buckets: Buckets | None = None
) -> Iterator[Place]:
    """One pass over the pairs in stored order, all in epoch 0; the last micro-batch may be short.

    With `buckets` the pairs of a shape follow each other, and the last micro-batch of each may be short. Of `world`
    processes, process `rank` gets every world-th micro-batch, and where one is missing in the last round the last one
    again: all make the same number of passes.
    """
    n = len(source)
    if buckets is None:
        parts = (list(range(begin, min(begin + micro_batch, n))) for begin in range(0, n, micro_batch))
        places = [Place(part[0], part, [0] * len(part)) for part in parts]
    else:
        places = list(_sorted(0, range(n), [0] * n, buckets, micro_batch))
    for number in range(rank, -(-len(places) // world) * world, world):
        yield places[min(number, len(places) - 1)]


def keyed_numbers(keys: np.ndarray, seed: int = 0) -> np.ndarray:
    """fp32 [n] in [0, 2^32]: a keyed number of each key [n] int64, by which pairs are held out."""
    out = np.empty(len(keys), dtype=np.float32)
    for begin in range(0, len(keys), CHUNK):
        part = torch.from_numpy(keys[begin : begin + CHUNK])
        out[begin : begin + CHUNK] = random_bits(part, torch.zeros_like(part), Stream.SPLIT, seed, 1)[:, 0].numpy()
    return out


def keyed_share(keys: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """bool [n]: a keyed choice of about `share` of the keys [n] int64; equal keys are chosen alike."""
    return keyed_numbers(keys, seed) < np.float32(share * 2**32)


def share_up_to(number: np.float32) -> float:
    """The smallest share with which `keyed_share` chooses the keys whose keyed number is at most `number`."""
    return float(np.nextafter(number, np.float32(np.inf))) / 2**32

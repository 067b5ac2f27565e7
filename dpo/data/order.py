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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from csrc_triton.philox import Stream, random_bits
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
    """

    seed: int
    start: int  # the first position: pairs consumed so far
    micro_batch: int  # pairs
    stop: int | None = None  # the position after the last; None: endless
    rank: int = 0
    world: int = 1


class Place(NamedTuple):
    """Where a micro-batch stands in a run, and its pairs."""

    position: int  # of its first pair
    indices: list[int]  # [B] in the source
    epochs: list[int]  # [B]


def run_order(source: Source, order: Order) -> Iterator[Place]:
    """The places of this process's micro-batches, one after another."""
    n, epoch, permutation = len(source), -1, np.empty(0, dtype=np.int64)
    position = order.start + order.rank * order.micro_batch
    while order.stop is None or position < order.stop:
        end = position + order.micro_batch
        if order.stop is not None:
            end = min(end, order.stop)
        indices, epochs = [], []
        for g in range(position, end):
            if g // n != epoch:
                epoch = g // n
                permutation = epoch_order(n, order.seed, epoch, source.groups, source.window)
            indices.append(int(permutation[g % n]))
            epochs.append(epoch)
        yield Place(position, indices, epochs)
        position += order.world * order.micro_batch


def stored_order(source: Source, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Place]:
    """One pass over the pairs in stored order, all in epoch 0; the last micro-batch may be short.

    Of `world` processes, process `rank` gets every world-th micro-batch, and where one is missing in the last round the
    last one again: all make the same number of passes.
    """
    count = -(-len(source) // micro_batch)
    for number in range(rank, -(-count // world) * world, world):
        begin = min(number, count - 1) * micro_batch
        indices = list(range(begin, min(begin + micro_batch, len(source))))
        yield Place(begin, indices, [0] * len(indices))


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

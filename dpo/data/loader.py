"""Micro-batches of image files, decoded ahead by worker processes.

The main process decides the order and reads parquet (a thread keeps ahead of it); workers get pairs with their file bytes
or paths and decode them. So the batches do not depend on the number of workers, and starting at position g costs the
reading of one batch, not of g pairs.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.data.ahead import read_ahead
from dpo.data.batch import Decoding, PairBatch, decode_batch
from dpo.data.images import FEW_BAD
from dpo.data.order import Place
from dpo.data.pairs import Pair, Source
from dpo.settings.config import Data

READ_AHEAD = 2  # batches read before a worker asks for them
GRACE = 20  # seconds that a worker lives on after SIGTERM, while the main process writes its checkpoint

T = TypeVar("T")

logger = logging.getLogger("dpo")


@dataclass(frozen=True)
class Reading:
    """How image files are read: by whom, how far ahead, and what happens when one cannot be used."""

    workers: int = 0  # processes; -1: half of the cores, at most 8
    prefetch: int = 4  # batches decoded ahead by each
    on_bad_image: str = "skip"  # or "stop"
    bad_image_limit: float = 0.01  # share of the pairs

    @classmethod
    def of(cls, data: Data) -> Reading:
        """As the settings say."""
        return cls(data.workers, data.prefetch, data.on_bad_image, data.bad_image_limit)


@dataclass(frozen=True)
class _Work:
    """What a worker gets: pairs to decode, and the epoch of each."""

    position: int
    pairs: list[Pair]
    draws: list[int]


def load(
    source: Source, places: Iterable[Place], decoding: Decoding, reading: Reading, micro_batch: int
) -> Generator[PairBatch, None, None]:
    """The micro-batches at `places`, in order, of at most `micro_batch` pairs. Close the generator to end its workers.

    Raises UserError for unreadable images, by reading.on_bad_image and bad_image_limit, and when a worker dies.
    """
    workers = worker_count(reading.workers)
    prefetch = _fit_shared_memory(reading.prefetch, workers, 2 * micro_batch * 3 * decoding.resolution**2)
    bad: dict[int, str] = {}
    work = (_Work(position, [source[i] for i in indices], epochs) for position, indices, epochs in places)
    ahead = read_ahead(work, READ_AHEAD) if workers and source.groups is not None else work
    loader = DataLoader(
        _Decoder(decoding),
        sampler=ahead,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader seeds its workers from it: the global one stays untouched
    )
    iterator: Iterator[PairBatch] | None = None
    try:
        iterator = iter(loader)
        while (batch := _next(iterator, workers)) is not None:
            _look_after(batch, bad, source, reading)
            yield batch
    finally:
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # now, not when the last traceback that knows the iterator is forgotten
        ahead.close()


def _next(iterator: Iterator[PairBatch], workers: int) -> PairBatch | None:
    try:
        return next(iterator, None)
    except UserError:
        raise
    except (RuntimeError, OSError, EOFError) as error:
        # A dead worker is noticed by the loader, or first by the pipe or socket whose other end it held.
        if not workers or (isinstance(error, RuntimeError) and not of_dead_worker(error)):
            raise
        raise worker_died(error) from error


def of_dead_worker(error: Exception) -> bool:
    """Whether torch raised this for a worker that died; it does so in the main thread, wherever that is just then."""
    return "DataLoader worker" in str(error)


def worker_died(error: Exception) -> UserError:
    return UserError(f"a data worker died ({first_line(error)}): memory or /dev/shm may be full; try fewer --workers or 0")


def _look_after(batch: PairBatch, bad: dict[int, str], source: Source, reading: Reading) -> None:
    """Logs each unreadable pair once, and stops when there are too many in this run of the program."""
    for key, reason in batch.bad:
        if reading.on_bad_image == "stop":
            raise UserError(f"{reason}; leave such pairs out with --on-bad-image skip")
        if key not in bad:
            bad[key] = reason
            logger.warning("pair left out: %s", reason)
    allowed = reading.bad_image_limit * len(source)
    if reading.bad_image_limit > 0:
        allowed = max(allowed, min(FEW_BAD, len(source) // 2))
    if len(bad) > allowed:
        last = next(reversed(bad.values()))
        raise UserError(f"{len(bad)} of {len(source)} pairs have an unreadable image, the last: {last}; see --bad-image-limit")


class _Decoder(Dataset[PairBatch]):
    """The "data set" of the loader: what it is indexed by is the work itself."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def __getitem__(self, work: _Work) -> PairBatch:
        return decode_batch(work.pairs, work.draws, work.position, self.decoding)


def _as_it_is(batch: T) -> T:
    return batch


def _start_worker(_: int) -> None:
    """Ctrl-C is the main process's business; after SIGTERM a worker serves it a little longer, then ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def worker_count(workers: int) -> int:
    """-1: half of the cores that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) // 2) if workers < 0 else workers


def _fit_shared_memory(prefetch: int, workers: int, batch_bytes: int) -> int:
    """Batches travel through /dev/shm, which containers keep small: fewer are decoded ahead when it is."""
    if not workers or not os.path.isdir("/dev/shm"):
        return prefetch
    space = os.statvfs("/dev/shm")
    room = int(0.8 * space.f_bavail * space.f_frsize / (workers * batch_bytes))
    if room < prefetch:
        logger.warning("/dev/shm has room for %d batches a worker: decoding fewer ahead (--prefetch, --workers)", max(room, 1))
    return max(1, min(prefetch, room))

"""Micro-batches in the order of the run, from any position, decoded ahead by worker processes.

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
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dpo.common.errors import UserError
from dpo.data.ahead import read_ahead
from dpo.data.batch import Decoding, PairBatch, decode_batch
from dpo.data.order import run_order
from dpo.data.pairs import Pair, Source

READ_AHEAD = 2  # batches read before a worker asks for them


FEW_BAD = 10  # unreadable images that any set may have, unless the limit is 0


GRACE = 20  # seconds that a worker lives on after SIGTERM, while the main process writes its checkpoint


logger = logging.getLogger("dpo")


def batches(
    source: Source,
    cfg: Any,
    *,
    seed: int,
    start: int,
    micro_batch: int,
    resolution: int,
    workers: int | None = None,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Generator[PairBatch, None, None]:
    """Batches of `micro_batch` pairs from global position `start` (pairs consumed so far), endless unless `stop` is given.

    Position g is pair epoch_order(seed, g // n)[g % n] in draw g // n; a batch may span the end of an epoch. With `world`
    processes, process `rank` gets every world-th batch. Close the generator to end its workers.
    Raises UserError for unreadable images by cfg.on_bad_image and cfg.bad_image_limit, and when a worker dies.
    """
    how = Decoding(resolution, seed, cfg.crop, cfg.flip, cfg.caption_dropout)
    work = _in_order(source, seed, start, stop, micro_batch, rank, world)
    yield from _run(work, how, source, cfg, micro_batch, workers)


def held_out_batches(
    source: Source, cfg: Any, *, micro_batch: int, resolution: int, workers: int | None = None
) -> Generator[PairBatch, None, None]:
    """One pass over held-out pairs as they are stored: draw 0, centre crop, no mirror, all captions; the last may be short."""
    spans = (range(begin, min(begin + micro_batch, len(source))) for begin in range(0, len(source), micro_batch))
    work = (_Work(span.start, [source[i] for i in span], [0] * len(span)) for span in spans)
    yield from _run(work, Decoding(resolution, seed=0), source, cfg, micro_batch, workers)


@dataclass(frozen=True)
class _Work:
    """What a worker gets: pairs to decode, and the epoch of each."""

    position: int
    pairs: list[Pair]
    draws: list[int]


def _in_order(
    source: Source, seed: int, start: int, stop: int | None, micro_batch: int, rank: int, world: int
) -> Iterator[_Work]:
    for position, indices, epochs in run_order(source, seed, start, stop, micro_batch, rank, world):
        yield _Work(position, [source[i] for i in indices], epochs)


def _run(
    work: Iterable[_Work], how: Decoding, source: Source, cfg: Any, micro_batch: int, workers: int | None
) -> Generator[PairBatch, None, None]:
    """Decodes the work, in order, and looks after images that cannot be used."""
    workers = worker_count(cfg.workers if workers is None else workers)
    prefetch = _fit_shared_memory(cfg.prefetch, workers, 2 * micro_batch * 3 * how.resolution**2)
    bad: dict[int, str] = {}
    ahead = read_ahead(work, READ_AHEAD) if workers and source.groups is not None else iter(work)
    loader = DataLoader(
        _Decoder(how),
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
    iterator: Any = None
    try:
        iterator = iter(loader)
        while (batch := _next(iterator, workers)) is not None:
            _look_after(batch, bad, source, cfg)
            yield batch
    finally:
        if workers and iterator is not None:  # now, not when the last traceback that knows the iterator is forgotten
            iterator._shutdown_workers()
        if isinstance(ahead, Generator):
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
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"a data worker died ({reason}): memory or /dev/shm may be full; try fewer --workers or 0")


def _look_after(batch: PairBatch, bad: dict[int, str], source: Source, cfg: Any) -> None:
    """Logs each unreadable pair once, and stops when there are too many in this run of the program."""
    for key, reason in batch.bad:
        if cfg.on_bad_image == "stop":
            raise UserError(f"{reason}; leave such pairs out with --on-bad-image skip")
        if key not in bad:
            bad[key] = reason
            logger.warning("pair left out: %s", reason)
    allowed = cfg.bad_image_limit * len(source)
    if cfg.bad_image_limit > 0:
        allowed = max(allowed, min(FEW_BAD, len(source) // 2))
    if len(bad) > allowed:
        last = next(reversed(bad.values()))
        raise UserError(f"{len(bad)} of {len(source)} pairs have an unreadable image, the last: {last}; see --bad-image-limit")


class _Decoder(Dataset):
    def __init__(self, how: Decoding):
        self.how = how

    def __getitem__(self, work: _Work) -> PairBatch:
        return decode_batch(work.pairs, work.draws, work.position, self.how)


def _as_it_is(batch: Any) -> Any:
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

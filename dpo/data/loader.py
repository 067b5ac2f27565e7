"""Micro-batches of image files, decoded ahead by worker processes.

The main process decides the order and reads parquet, in a thread ahead of the training loop. Workers get pairs with
their file bytes or paths and decode them. So the batches do not depend on the number of workers, and starting at
position g reads one batch, not g pairs.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dpo.common.command import of_launcher
from dpo.common.errors import UserError
from dpo.common.machine import start_method, usable_cores
from dpo.common.words import counted, first_line
from dpo.data.ahead import read_ahead
from dpo.data.batch import Decoding, PairBatch, decode_batch
from dpo.data.images import STOPPED, check_bad
from dpo.data.kept import Kept
from dpo.data.labels import SAME
from dpo.data.order import Place
from dpo.data.pairs import Pair, Source, things
from dpo.settings.config import Data

READ_AHEAD = 2  # batches read before a worker asks for them
LOCK_WAIT = 2.0  # seconds for a lock of the workers, which one that was killed may have taken with it
GRACE = 20  # seconds that a worker lives on after SIGTERM, while the main process writes its checkpoint

T = TypeVar("T")

logger = logging.getLogger("dpo")


@dataclass(frozen=True)
class Reading:
    """How image files are read: by whom, how far ahead, and what happens when one cannot be used."""

    workers: int = 0  # processes; -1: half of the cores, at most 8
    prefetch: int = 4  # batches that each worker decodes ahead
    on_bad_image: str = "skip"  # or "stop"
    bad_image_limit: float = 0.01  # share of the pairs
    shared: bool = False  # among processes: whoever gathers them counts the pairs left out and says which

    @classmethod
    def of(cls, data: Data) -> Reading:
        """From the settings."""
        return cls(data.workers, data.prefetch, data.on_bad_image, data.bad_image_limit)


@dataclass(frozen=True)
class _Work:
    """A micro-batch for a worker: where it stands, and the pairs to decode.

    One whose encoded pairs are in memory has none to decode, and comes back as it is, in its turn.
    """

    place: Place
    pairs: list[Pair]
    keeps: bool  # whether encoded pairs are kept


def load(
    source: Source,
    places: Iterable[Place],
    decoding: Decoding,
    reading: Reading,
    micro_batch: int,
    kept: Kept | None = None,
) -> Generator[PairBatch, None, None]:
    """The micro-batches at `places`, in order, of at most `micro_batch` pairs. Close the generator to end its workers.

    kept: encoded pairs of this source; what it has is neither read nor decoded.
    Raises UserError for unreadable images, as reading.on_bad_image and bad_image_limit say, and when a worker dies.
    """
    workers = worker_count(reading.workers)
    prefetch = _fit_shared_memory(reading.prefetch, workers, source.sides * micro_batch * 3 * decoding.resolution**2)
    bad: dict[int, str] = {}
    work = (_work(source, place, kept) for place in places)
    ahead = read_ahead(work, READ_AHEAD) if workers and source.groups is not None else work
    loader = DataLoader(
        _Decoder(decoding),
        sampler=ahead,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method() if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader seeds its workers from it: the global one stays untouched
    )
    iterator: Iterator[PairBatch | _Work] | None = None
    try:
        iterator = iter(loader)
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._workers_done_event = _Ending(iterator._workers_done_event)  # type: ignore[assignment]  # acts as one
        while (made := _next(iterator, workers)) is not None:
            batch = _from_memory(made, kept) if isinstance(made, _Work) else made
            _stop_at(batch, reading)
            if not reading.shared:
                look_after(batch.bad, bad, source, reading)
            yield batch
    finally:
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            _end(iterator)  # now: a traceback may hold the iterator, and with it the workers, for long
        ahead.close()


class _Ending:
    """The event by which torch tells workers to end, as the main process uses it: without waiting for its lock for ever.

    A worker that is killed while it asks the event takes the lock with it. torch's own handling of a dead worker would
    wait for that.
    """

    def __init__(self, event: Any) -> None:
        self._event, self._told = event, False

    def is_set(self) -> bool:
        return self._told

    def set(self) -> None:
        self._told = True
        telling = threading.Thread(
            target=self._event.set, daemon=True
        )  # where the lock is lost it ends with the process
        telling.start()
        telling.join(LOCK_WAIT)  # then torch ends the workers that were not told


def _work(source: Source, place: Place, kept: Kept | None) -> _Work:
    there = kept is not None and kept.has(place.indices, place.epochs)
    return _Work(place, [] if there else [source[i] for i in place.indices], kept is not None)


def _from_memory(work: _Work, kept: Kept | None) -> PairBatch:
    assert kept is not None, "only then is there nothing to decode"
    batch = kept.batch(work.place)
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _next(iterator: Iterator[PairBatch | _Work], workers: int) -> PairBatch | _Work | None:
    try:
        return next(iterator, None)
    except UserError:
        raise
    except (RuntimeError, OSError, EOFError) as error:
        # torch reports a dead worker by a RuntimeError, unless a pipe or socket to the worker breaks first.
        if not workers or (isinstance(error, RuntimeError) and not of_dead_worker(error)):
            raise
        raise worker_died(error) from error


def _end(iterator: _MultiProcessingDataLoaderIter) -> None:
    """Ends the workers. One that dies of that, as a library's threads make it at times, has done its work."""
    try:
        iterator._shutdown_workers()
    except RuntimeError as error:
        if not of_dead_worker(error):
            raise


def of_dead_worker(error: Exception) -> bool:
    """Whether torch raised this for a worker that died. Its signal handler raises at any line of the main thread."""
    return "DataLoader worker" in str(error)


def worker_died(error: Exception) -> UserError:
    """The message on a worker that died, for the user."""
    return UserError(
        f"a data worker died ({first_line(error)}): memory or /dev/shm may be full; try fewer --workers or 0"
    )


def _stop_at(batch: PairBatch, reading: Reading) -> None:
    """Raises UserError for an unreadable image that stops the run."""
    for _, reason in batch.bad:
        if reading.on_bad_image == "stop" and not reason.startswith(SAME):
            raise UserError(STOPPED.format(reason))


def look_after(found: Iterable[tuple[int, str]], bad: dict[int, str], source: Source, reading: Reading) -> None:
    """Logs each of the pairs `found` unusable (key, what is wrong) once, in `bad`. Raises UserError where too many are."""
    found = list(found)
    for key, reason in found:
        if key not in bad:
            bad[key] = reason
            logger.warning("%s left out: %s", things(source)[:-1], reason)
    if unreadable := [reason for reason in bad.values() if not reason.startswith(SAME)] if found else []:
        check_bad(len(unreadable), len(source), reading.bad_image_limit, unreadable[-1])


class _Decoder(Dataset[PairBatch | _Work]):
    """The "data set" of the DataLoader: its index is the work to do."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def __getitem__(self, work: _Work) -> PairBatch | _Work:
        if not work.pairs:
            return work
        batch = decode_batch(work.pairs, work.place, self.decoding)
        batch.indices = work.place.indices if work.keeps else None
        return batch


def _as_it_is(batch: T) -> T:
    return batch


def _start_worker(_: int) -> None:
    """Leaves Ctrl-C to the main process; after SIGTERM or SIGHUP a worker goes on for GRACE seconds, then ends.

    It ends with the main process, however early that is killed: torch looks only whether the parent changes afterwards.
    """
    if (main := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # Windows has none: there SIGTERM ends a process at once, whatever it would do
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                signal.signal(number, lambda *_: signal.alarm(GRACE))


def _end_with(main: multiprocessing.process.BaseProcess) -> None:
    main.join()
    os._exit(1)


def worker_count(workers: int) -> int:
    """Number of worker processes; -1 means half of the cores that this process may use, at most 8.

    torchrun's processes on this machine share its cores.
    """
    return min(8, usable_cores() // 2 // of_launcher("LOCAL_WORLD_SIZE", 1)) if workers < 0 else workers


def _fit_shared_memory(prefetch: int, workers: int, batch_bytes: int) -> int:
    """Batches to decode ahead per worker: at most `prefetch`, fewer where /dev/shm is small, as it is in containers.

    Batches travel from the workers through /dev/shm; one takes `batch_bytes`.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return prefetch
    space = os.statvfs("/dev/shm")
    room = int(0.8 * space.f_bavail * space.f_frsize / (workers * batch_bytes))
    if room < prefetch:
        logger.warning(
            "/dev/shm has room for %s a worker: decoding fewer ahead (--prefetch, --workers)",
            counted(max(room, 1), "batch", "batches"),
        )
    return max(1, min(prefetch, room))

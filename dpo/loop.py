"""What surrounds the updates: signals, logging, validation, sample images, checkpoints, and the end of a run."""

from __future__ import annotations

import itertools
import logging
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpo import build, checkpoint, finish, validation
from dpo.config import Config, flatten, to_toml
from dpo.console import Progress
from dpo.errors import UserError
from dpo.trackers import Trackers, open_trackers

log = logging.getLogger("dpo")
INTERRUPTED = 130
TrainStep = Callable[[build.Run, Iterator[Any]], dict[str, Any]]


class Stopped(Exception):
    """The user or the system asked the run to stop; the update in progress is dropped."""


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event; a second SIGINT interrupts at once."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        log.warning("%s: writing a checkpoint, then stopping (press Ctrl-C again to stop without one)", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until(stop: threading.Event, batches: Iterator[Any], count: int) -> Iterator[Any]:
    """The next `count` micro-batches; raises Stopped between two of them once `stop` is set."""
    for batch in itertools.islice(batches, count):
        if stop.is_set():
            raise Stopped
        yield batch


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(config: Config, notes: list[str], train_step: TrainStep) -> int:
    """Run `config` from where it stands to its end. Returns the exit code; raises UserError for what a person can mend."""
    with stop_on_signals() as stop:
        try:
            run = build.build(config, notes)
            clear_output(run)
            checkpoint.write_text(run.output / "config.toml", to_toml(run.config))
            out = run.config.output
            trackers = open_trackers(
                run.output, out.tensorboard, out.wandb, out.project, None, flatten(run.config), run.done if run.done else None
            )
            try:
                finish.begin(run, trackers)
                updates(run, trackers, train_step, stop)
                finish.end(run, trackers)
            finally:
                trackers.close()
        except Stopped:
            return INTERRUPTED
        except KeyboardInterrupt:
            log.warning("stopped without a checkpoint; --resume latest goes on from the last one, if there is one")
            return INTERRUPTED
        except torch.OutOfMemoryError as error:
            raise UserError(
                "out of GPU memory: lower --batch-size and raise --accumulation by the same factor (the result is the same), "
                "turn on --checkpointing, or train --lora; --resume latest goes on from the last checkpoint"
            ) from error
    return 0


def clear_output(run: build.Run) -> None:
    """Make the output folder; with --overwrite, drop what an earlier run left that this one would mistake for its own."""
    if run.config.output.overwrite and not run.config.output.resume:
        for name in ("checkpoints", "samples"):
            shutil.rmtree(run.output / name, ignore_errors=True)
        for name in ("summary.json", "tables.json", "report.html"):
            (run.output / name).unlink(missing_ok=True)
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run.output}: {error.strerror}; choose another --output") from error


def updates(run: build.Run, trackers: Trackers, train_step: TrainStep, stop: threading.Event) -> None:
    """All updates that are left. Raises Stopped when asked to stop, after a checkpoint."""
    out, optim = run.config.output, run.config.optim
    batches = run.batches()
    with Progress(run.total, run.done, out.log_every) as progress:
        while run.done < run.total:
            began = time.monotonic()
            try:
                rate = run.learning_rate()
                figures = train_step(run, until(stop, batches, optim.accumulation))
            except Stopped:
                _stop(run, trackers)
                raise
            except build.Diverged as error:
                build.snapshot(run)
                trackers.event({"event": "diverged", "step": run.done, "message": str(error)})
                finish.report(run, "failed", str(error))
                raise
            run.done += 1
            run.position += run.nominal
            seconds = time.monotonic() - began
            figures |= {"learning_rate": rate, "pairs_per_s": run.nominal / seconds, "seconds": seconds}
            figures |= run.speed.figures(figures["pairs_per_s"])
            figures["peak_memory_gib"] = peak_memory_gib(run.device)
            last = run.done == run.total
            if run.done % out.log_every == 0 or last:
                trackers.log(run.done, figures)
            progress.update(run.done, figures)
            if run.held_out is not None and (run.done % out.validate_every == 0 or last):
                trackers.event({"event": "validation", "step": run.done, **validation.accuracy(run.step, run.held_out)})
            if out.sample_every and run.done % out.sample_every == 0 and not last:
                finish.sample_images(run)
            if last or (out.checkpoint_every and run.done % out.checkpoint_every == 0):
                build.snapshot(run)


def _stop(run: build.Run, trackers: Trackers) -> None:
    """Drop the update in progress, write a checkpoint of the last whole one, and say how to go on."""
    run.drop()
    path = build.snapshot(run)
    trackers.event({"event": "interrupted", "step": run.done})
    finish.report(run, "interrupted", "stopped by a signal")
    log.warning("stopped after update %d of %d; checkpoint %s", run.done, run.total, path)
    log.warning("go on with: python -m dpo.train --output %s --resume latest", run.output)

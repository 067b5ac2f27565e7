"""What surrounds the updates: signals, logging, validation, sample images, checkpoints, and the end of a run."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import shlex
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from dpo.common import files, locks, machine
from dpo.common.command import INTERRUPTED
from dpo.common.console import Progress
from dpo.common.errors import Stopped, UserError
from dpo.common.words import first_line
from dpo.data.batch import PairBatch
from dpo.data.loader import of_dead_worker, worker_died
from dpo.pages.figures import progress_fields
from dpo.pages.folder import CONFIG_FILE
from dpo.settings.config import Config, Output, change, flatten, to_toml
from dpo.training import build, checkpoint, judging, results, samples, summary, validation
from dpo.training.folder import check_output, clear_output
from dpo.training.judging import Evaluate
from dpo.training.run import Diverged, Figures, Run
from dpo.training.state import snapshot
from dpo.training.trackers import Trackers, open_trackers

log = logging.getLogger("dpo")

OF_OTHERS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


# What ends a run from outside. Windows has no SIGHUP, which a closed terminal sends.
ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

NOT_COMPARED = "its result is not compared with its start yet"

TrainStep = Callable[[Run, Iterator[PairBatch]], Figures]


@contextmanager
def handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Inside the block `handler` gets these signals, but those that are ignored: nohup, or a shell for a job behind `&`, asks so.

    Does nothing outside the main thread, which alone may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Inside the block SIGINT, SIGTERM and SIGHUP set the event; a second SIGINT raises KeyboardInterrupt at once."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        name = signal.Signals(number).name
        log.warning("%s: writing a checkpoint, then stopping (press Ctrl-C again to stop without one)", name)

    with handled(ask, signal.SIGINT, *ENDS):
        yield stop


def until(stop: threading.Event, batches: Iterator[PairBatch]) -> Iterator[PairBatch]:
    """The micro-batches. Raises Stopped in place of the next one once `stop` is set."""
    for batch in batches:
        if stop.is_set():
            raise Stopped
        yield batch


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return machine.peak_memory() / 2**30


def train(config: Config, notes: list[str], train_step: TrainStep, evaluate: Evaluate) -> int:
    """Trains the run of `config` to its end, from its checkpoint where it is resumed; the exit code.

    Raises UserError for what a person can mend.
    """
    try:
        with handled(signal.default_int_handler, *ENDS):  # outside the updates they interrupt like Ctrl-C
            _train(config, notes, train_step, evaluate)
    except Stopped:
        return INTERRUPTED
    except KeyboardInterrupt:
        log.warning("stopped at once; --resume latest goes on from the last checkpoint, if there is one")
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory: lower --batch-size and raise --accumulation by the same factor (the result is the same), "
            "turn on --checkpointing, or train --lora; --resume latest goes on from the last checkpoint"
        ) from error
    except RuntimeError as error:
        if not of_dead_worker(error):
            raise
        raise worker_died(error) from error
    except (OSError, SafetensorError) as error:
        if (unread := _not_ours(error, config)) is not None:
            raise unread from error
        raise files.disk_error(error, Path(config.output.output).expanduser()) from error
    return 0


def _not_ours(error: Exception, config: Config) -> UserError | None:
    """The message on a file outside of the output folder; None where the error is one of writing the output."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str) or getattr(error, "errno", None) not in OF_OTHERS:
        return None
    if Path(name).resolve().is_relative_to(Path(config.output.output).expanduser().resolve()):
        return None
    return UserError(f"{name}: {getattr(error, 'strerror', error)}; mend that, then --resume latest")


def _train(config: Config, notes: list[str], train_step: TrainStep, evaluate: Evaluate) -> None:
    samples.asked_prompts(config.output)  # refuses a missing file before anything is loaded
    output = check_output(config)
    with ExitStack() as stack:
        if there := output.is_dir():  # before its checkpoints are read
            stack.enter_context(locks.held(output, "--output"))
        run = build.build(config, notes)
        if not there:  # made only now: a mistake in a setting leaves no folder behind
            clear_output(output, config.output)
            stack.enter_context(locks.held(output, "--output"))
            check_output(change(config, resume=None, overwrite=False))  # another process may have made a run here
        clear_output(output, config.output)
        if run.resumed is not None:
            checkpoint.set_aside(run.checkpoints, run.resumed, run.done)
        with _tracking(run.output, run.config, run.done) as trackers:
            ending = _make(run, trackers, train_step)
            del run
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what is drawn and scored now finds the memory free
            with _told_how_to_finish(ending.output, ending.step):
                _conclude(ending, trackers, evaluate)


class Ending(NamedTuple):
    """What is left to do of a run whose result is on disk, once its model, data and optimizer are gone."""

    output: Path
    asked: Output
    step: int
    written: list[str]  # files of the result
    compared: list[str]  # words of python -m dpo.evaluate; empty where no comparison is wanted


@contextmanager
def _tracking(output: Path, config: Config, done: int) -> Iterator[Trackers]:
    """The trackers of a run at update `done`, closed at the end of the block."""
    out = config.output
    trackers = open_trackers(output, out.tensorboard, out.wandb, out.project, None, flatten(config), done or None)
    try:
        yield trackers
    except BaseException:
        with suppress(Exception):  # a full disk has been said by what is raised here
            trackers.close()
        raise
    trackers.close()


def _make(run: Run, trackers: Trackers, train_step: TrainStep) -> Ending:
    """Everything that needs the run: updates, result, last sample images, report."""
    compared = judging.words(run)  # refuses what could not be compared before anything is trained
    _begin(run, trackers)
    if not (run.complete and (run.output / CONFIG_FILE).is_file()):  # from here on the folder holds a run
        files.write_text(run.output / CONFIG_FILE, to_toml(run.config))
    with stop_on_signals() as stop:
        updates(run, trackers, train_step, stop)
    with _told_how_to_finish(run.output, run.done):
        if compared:
            judging.prepare(run)
        written = results.write(run)
        samples.write(run)
        summary.report(run, *(("interrupted", NOT_COMPARED) if compared else ("finished", "")))
    return Ending(run.output, run.config.output, run.done, written, compared)


def _conclude(ending: Ending, trackers: Trackers, evaluate: Evaluate) -> None:
    """Compares the result with its start, and uploads what was made.

    Raises Stopped when interrupted: the result is already written, and --resume compares it.
    """
    if ending.compared:
        try:
            found = judging.evaluated(evaluate, ending.compared)
        except KeyboardInterrupt:
            log.warning("the comparison was cut short; the aligned model in %s is whole", ending.output)
            log.warning("go on with: %s", _goes_on(ending.output))
            raise Stopped from None
        if found:
            trackers.event({"event": "judged", "step": ending.step, **found})
        summary.conclude(ending.output, found, ending.asked.model_card)
    if ending.asked.push_to_hub:
        results.upload(ending.output, ending.asked, ending.written)
    log.info("done: %s", ending.output)


def _goes_on(output: Path) -> str:
    return f"python -m dpo.train --output {shlex.quote(str(output))} --resume latest"


@contextmanager
def _told_how_to_finish(output: Path, done: int) -> Iterator[None]:
    """Around what follows the last update, whose checkpoint is there: an error is said to cost none of the training."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Stopped | KeyboardInterrupt):  # of those it is said elsewhere
            log.warning("all %d updates are made and kept; finish with: %s", done, _goes_on(output))
        raise


def _begin(run: Run, trackers: Trackers) -> None:
    trackers.event(
        {"event": "started", "step": run.done, "total": run.total, "device": summary.device_name(run.device)}
    )
    run.started = time.time()
    samples.before(run)


def updates(run: Run, trackers: Trackers, train_step: TrainStep, stop: threading.Event) -> None:
    """Makes all updates that are left.

    Raises Stopped after `stop` was set, and what ended the updates, whatever it is; both after writing a checkpoint of
    the last whole update. KeyboardInterrupt alone, the second Ctrl-C, does not wait for one. Raises UserError when no
    pair could be used.
    """
    first, batches = run.done, run.batches()
    try:
        used = _all_updates(run, trackers, train_step, until(stop, batches))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Who stops a whole group of processes stops the workers too, which wait for the main process, but not for ever.
        ending = Stopped() if stop.is_set() and isinstance(error, Exception) and of_dead_worker(error) else error
        _rescue(run, trackers, batches, ending)
        if ending is error:
            raise
        raise ending from error
    if run.done > first and not used:
        raise UserError(
            "no pair could be used, nothing was trained: the warnings above say why; mend the images of --data"
        )


def _all_updates(run: Run, trackers: Trackers, train_step: TrainStep, batches: Iterator[PairBatch]) -> int:
    """Makes the updates, with what belongs to each; the number of pairs that could be used."""
    out, optim = run.config.output, run.config.optim
    held_out: Figures = {}
    used = 0
    every = out.validate_every or run.total  # decided when the run was built
    with Progress(run.total, progress_fields, run.done, out.log_every) as progress:
        while run.done < run.total:
            began = time.monotonic()
            rate = run.learning_rate()
            figures = train_step(run, itertools.islice(batches, optim.accumulation))
            used += figures["pairs"]
            seconds = time.monotonic() - began
            figures |= {"learning_rate": rate, "pairs_per_s": run.nominal / seconds, "seconds": seconds}
            figures |= run.speed.figures(figures["pairs_per_s"])
            figures["peak_memory_gib"] = peak_memory_gib(run.device)
            run.count()
            last = run.done == run.total
            if _is_logged(run):
                trackers.log(run.done, figures)
            if run.held_out is not None and (run.done % every == 0 or last):
                held_out = _held_out(run, run.held_out)
                trackers.event({"event": "validation", "step": run.done, **held_out})
            progress.update(run.done, figures | held_out)
            if out.sample_every and run.done % out.sample_every == 0 and not last:
                samples.write(run)
            if last or (out.checkpoint_every and run.done % out.checkpoint_every == 0):
                _check_there(run)
                snapshot(run)
    return used


def _check_there(run: Run) -> None:
    """Raises UserError where the output folder is gone: made anew it would hold a checkpoint where nobody looks for it."""
    if not run.output.is_dir():
        raise UserError(f"{run.output} is gone: it was moved or deleted while the run went on; resume where it is now")


def _is_logged(run: Run) -> bool:
    """Whether the figures of the last update belong into metrics.jsonl."""
    return run.done % run.config.output.log_every == 0 or run.done == run.total


def _held_out(run: Run, pairs: validation.HeldOut) -> Figures:
    """Held-out accuracy of the weights that are saved: the averaged ones, which is said, where there are any."""
    with run.updater.averaged():
        found = validation.accuracy(run.step, pairs)
    return {**found, "weights": "averaged"} if run.updater.ema else found


def _rescue(run: Run, trackers: Trackers, batches: Generator[PairBatch, None, None], ending: BaseException) -> None:
    """Drops the update in progress, writes a checkpoint of the last whole one, and logs how to go on after `ending`.

    A state that is not whole is not written: weights between two updates, or an update without its line in
    metrics.jsonl. Raises no Exception, which would take the place of the one that ended the run.
    """
    whole = run.whole and (trackers.logged == run.done or not _is_logged(run))
    path = None
    try:
        batches.close()  # else another dying worker interrupts what follows
        if whole:
            run.drop()
            _check_there(run)
            path = snapshot(run, emergency=True, diverged=isinstance(ending, Diverged))
    except Exception as error:  # the disk is full, or the device is dead
        log.warning("update %d could not be kept: no checkpoint can be written (%s)", run.done, first_line(error))
    if not whole:
        log.warning("the state is between two updates: no checkpoint is written of it")
    try:
        _record(run, trackers, ending)
    except Exception as error:
        log.warning("the end of the run is not in its report (%s)", first_line(error))
    if path is not None:
        log.warning("stopped after update %d of %d; checkpoint %s", run.done, run.total, path)
    elif not run.output.is_dir():
        log.warning("%s is gone: it was moved or deleted; resume the run where it is now", run.output)
        return
    elif before := checkpoint.listing(run.checkpoints):
        log.warning("stopped in update %d of %d; the last checkpoint is %s", run.done + 1, run.total, before[-1])
    else:
        log.warning("stopped with no checkpoint to go on from")
        return
    log.warning("go on with: %s", _goes_on(run.output))


def _record(run: Run, trackers: Trackers, ending: BaseException) -> None:
    """Writes how the updates ended into metrics.jsonl and the report."""
    if isinstance(ending, Stopped):
        trackers.event({"event": "interrupted", "step": run.done})
        summary.report(run, "interrupted", "stopped by a signal")
        return
    reason = str(ending) if isinstance(ending, UserError) else f"{type(ending).__name__}: {first_line(ending)}"
    trackers.event({"event": "failed", "step": run.done, "message": reason})
    summary.report(run, "failed", reason)

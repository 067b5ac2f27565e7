"""What surrounds the updates: signals, logging, validation, sample images, checkpoints, and the end of a run."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from dpo.common import files, locks
from dpo.common.command import INTERRUPTED
from dpo.common.console import Progress
from dpo.common.errors import OutOfMemory, Stopped, UserError
from dpo.data.batch import PairBatch, of_update
from dpo.data.loader import of_dead_worker, worker_died
from dpo.pages import afterwards
from dpo.pages.figures import progress_fields
from dpo.pages.folder import CHECKPOINTS, CONFIG_FILE, read_run
from dpo.settings.config import Config, Output, change, flatten, to_toml
from dpo.training import build, checkpoint, choice, judging, results, samples, summary
from dpo.training.folder import check_output, clear_output, folder_of, take_back
from dpo.training.judging import Evaluate
from dpo.training.metrics import peak_memory_gib
from dpo.training.parallel import Processes, broken, forget, remember, remembered, restarts
from dpo.training.rescue import check_there, goes_on, is_logged, known, not_ours, rescue
from dpo.training.run import Figures, Run
from dpo.training.state import Held, held, snapshot
from dpo.training.trackers import Trackers, open_trackers
from dpo.training.trackers import check as check_trackers
from dpo.training.waiting import Waiting

log = logging.getLogger("dpo")


# What ends a run from outside. Windows has no SIGHUP, which a closed terminal sends.
ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

BEGUN = "begun"  # remembered for a restart: the output folder holds this run
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


def until_agreed(run: Run, batches: Iterator[PairBatch]) -> Iterator[PairBatch]:
    """The micro-batches of a sharded run. Raises Stopped in all processes at the same one once any was asked to stop."""
    for batch in batches:
        if run.processes.tensors(torch.tensor([run.stop.is_set()])).any():
            run.stopping = True
            raise Stopped
        yield batch


def train(
    config: Config,
    notes: list[str],
    train_step: TrainStep,
    evaluate: Evaluate,
    processes: Processes | None = None,
) -> int:
    """Trains the run of `config` to its end, from its checkpoint where it is resumed; the exit code.

    processes: those that train it together, this one among them; None: this one alone. Raises UserError for what a
    person can mend.
    """
    processes = processes or Processes()
    try:
        with handled(signal.default_int_handler, *ENDS):  # outside the updates they interrupt like Ctrl-C
            _train(config, notes, train_step, evaluate, processes)
    except Stopped as error:
        processes.ends(error)
        return INTERRUPTED
    except KeyboardInterrupt as error:
        processes.ends(error)
        log.warning("stopped at once; --resume latest goes on from the last checkpoint, if there is one")
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "out of GPU memory: lower --batch-size and raise --accumulation by the same factor (the result is the same), "
            "turn on --checkpointing, or train --lora; --resume latest goes on from the last checkpoint",
            at_first=getattr(error, "at_first", False),
        ) from error
    except RuntimeError as error:
        if not of_dead_worker(error):
            raise
        raise worker_died(error) from error
    except (OSError, SafetensorError) as error:
        if (unread := not_ours(error, config)) is not None:
            raise unread from error
        raise files.disk_error(error, Path(config.output.output).expanduser()) from error
    return 0


def again(config: Config, processes: Processes) -> Config:
    """`config` as torchrun's restart of a run goes on with it: from its latest checkpoint, once it had begun."""
    if not restarts() or processes.word_of_first(remembered()) != BEGUN:  # the first alone began it
        return config
    whole = checkpoint.listing(folder_of(config) / CHECKPOINTS)
    resume = config.output.resume if config.output.resume and not whole else "latest"
    log.warning("started again by torchrun, for the %d. time", restarts())
    return change(config, resume=resume, overwrite=False)


def _built(config: Config, notes: list[str], processes: Processes) -> Run:
    """As `build.build`; memory that is full there is too small for these settings."""
    try:
        return build.build(config, notes, processes)
    except torch.OutOfMemoryError as error:
        vars(error)["at_first"] = True
        raise


def _train(config: Config, notes: list[str], train_step: TrainStep, evaluate: Evaluate, processes: Processes) -> None:
    samples.asked_prompts(config.output)  # refuses a missing file before anything is loaded
    check_trackers(config.output.tensorboard, config.output.wandb)
    if not processes.first:
        _help(_built(config, notes, processes), train_step)
        return
    output = check_output(config)
    with ExitStack() as stack:
        if there := output.is_dir():  # before its checkpoints are read
            stack.enter_context(locks.held(output, "--output"))
        run = _built(config, notes, processes)
        if not there:  # made only now: a mistake in a setting leaves no folder behind
            clear_output(output, config.output)
            stack.enter_context(locks.held(output, "--output"))
            check_output(change(config, resume=None, overwrite=False))  # another process may have made a run here
        clear_output(output, config.output)
        remember(BEGUN)
        if run.resumed is not None:
            checkpoint.go_on_from(run.resumed, run.checkpoints, run.done)
            choice.bring(run)
        with _tracking(run.output, run.config, run.done) as trackers:
            ending = _make(run, trackers, train_step)
            del run
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what is drawn and scored now finds the memory free
            with _told_how_to_finish(ending.output, ending.step):
                _conclude(ending, trackers, evaluate)
    forget()


def _help(run: Run, train_step: TrainStep) -> None:
    """What the other processes do of a run: the updates, and no file."""
    judging.words(run)  # refuses as in the first one
    with open(os.devnull, "w") as nowhere, stop_on_signals() as stop:
        trackers = Trackers(nowhere, [])
        with whole(run, _draws_before(run)):
            run.processes.once(_begin, run, trackers)
        updates(run, trackers, train_step, stop)
    with whole(run):
        run.processes.leave()


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
    trackers = open_trackers(
        output, out.tensorboard, out.wandb, out.project, out.run_name, flatten(config), done or None
    )
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
    with whole(run, _draws_before(run)):
        run.processes.once(_begin, run, trackers)
    if not (run.complete and (run.output / CONFIG_FILE).is_file()):  # from here on the folder holds a run
        files.write_text(run.output / CONFIG_FILE, to_toml(change(run.config, overwrite=False, resume=None)))
    with stop_on_signals() as stop:
        updates(run, trackers, train_step, stop)
    with whole(run), _told_how_to_finish(run.output, run.done):
        run.processes.leave()
        choice.keep(run)
        if compared:
            judging.prepare(run)
        written = results.write(run)
        summary.note_result(run)
        trackers.picture(run.done, samples.write(run))
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
            log.warning("go on with: %s", goes_on(ending.output))
            raise Stopped from None
        if found:
            trackers.event({"event": "judged", "step": ending.step, **found})
        summary.conclude(ending.output, found, ending.asked.model_card)
    if ending.asked.push_to_hub:
        results.upload(ending.output, ending.asked, ending.written)
    log.info("done: %s", ending.output)
    for line in afterwards.next_steps(read_run(ending.output), judging.EMBEDDED):
        log.info("%s", line)


@contextmanager
def _told_how_to_finish(output: Path, done: int) -> Iterator[None]:
    """Around what follows the last update, whose checkpoint is there: an error is said to cost none of the training."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Stopped | KeyboardInterrupt):  # of those it is said elsewhere
            log.warning("update %d, the last, is made and kept; finish with: %s", done, goes_on(output))
        raise


def _draws_before(run: Run) -> bool:
    return run.config.output.samples and not run.done


def _begin(run: Run, trackers: Trackers) -> None:
    trackers.event(summary.begun(run))
    run.started = time.time()
    samples.before(run)


def updates(run: Run, trackers: Trackers, train_step: TrainStep, stop: threading.Event) -> None:
    """Makes all updates that are left.

    Raises Stopped after `stop` was set, and what ended the updates, whatever it is; both after writing a checkpoint of
    the last whole update. KeyboardInterrupt alone, the second Ctrl-C, does not wait for one. Raises UserError when no
    pair could be used.
    """
    first, batches, run.stop = run.done, run.batches(), stop
    try:
        watched: Iterator[PairBatch] = batches
        if run.updater.shards is not None:
            watched = until_agreed(run, batches)
        elif run.processes.first:  # it may wait in a sum for the others, so these go on until it has ended
            watched = until(stop, batches)
        used = _all_updates(run, trackers, train_step, watched)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Who stops a whole group of processes stops the workers too, which wait for the main process, but not for ever.
        ending = Stopped() if stop.is_set() and isinstance(error, Exception) and _of_others(error) else error
        ending = run.processes.meaning(ending)
        if isinstance(error, torch.OutOfMemoryError):
            vars(error)["at_first"] = run.done == first
        rescue(run, trackers, batches, ending)
        ending = known(run, ending)
        if ending is error:
            raise
        raise ending from error
    if run.done > first and not used:
        if run.processes.first and not first:
            take_back(run.output)
        raise UserError(
            "no pair could be used, nothing was trained: the warnings above say why; mend the images of --data"
        )


def _of_others(error: Exception) -> bool:
    """Whether it was raised because another process is gone, a data worker or one that trains too."""
    return of_dead_worker(error) or broken(error)


def _all_updates(run: Run, trackers: Trackers, train_step: TrainStep, batches: Iterator[PairBatch]) -> int:
    """Makes the updates, with what belongs to each; the number of pairs that could be used."""
    out = run.config.output
    held_out: Figures = {}
    used, first = 0, run.done
    waiting = Waiting(batches, warns=run.device.type == "cuda")
    every = out.validate_every or run.total  # decided when the run was built
    shown = Progress(run.total, lambda figures: progress_fields(figures, run.things), run.done, out.log_every)
    with shown if run.processes.first else nullcontext() as progress:
        if run.held_out is not None and run.measured < run.done and (run.done % every == 0 or run.done == run.total):
            held_out, better = choice.measure(run, run.held_out)  # the last start was stopped inside it
            trackers.event({"event": "validation", "step": run.done, **held_out})
            run.processes.once(_kept, run, held(run))
        while run.done < run.total and not run.ended:
            if run.stopping:
                raise Stopped
            began = time.monotonic()
            rate = run.learning_rate()
            figures = train_step(run, of_update(waiting))
            used += figures["pairs"]
            seconds = time.monotonic() - began
            figures |= {"learning_rate": rate, "pairs_per_s": run.nominal / seconds, "seconds": seconds}
            kept = run.kept.take() * run.processes.count / run.nominal if run.kept is not None else 0.0
            figures |= run.speed.figures(figures["pairs_per_s"] / run.processes.count, kept)  # of one device
            figures["wait_share"] = waiting.share(seconds)
            figures["peak_memory_gib"] = peak_memory_gib(run.device)
            run.count()
            last, better = run.done == run.total, False
            if is_logged(run):
                trackers.log(run.done, figures)
            if run.held_out is not None and (run.done % every == 0 or last):
                held_out, better = choice.measure(run, run.held_out)
                trackers.event({"event": "validation", "step": run.done, **held_out})
                last = last or run.ended
                if last and trackers.logged < run.done:  # after an early end
                    trackers.log(run.done, figures)
            if progress is not None:
                progress.update(run.done, figures | held_out)
            if out.sample_every and run.done % out.sample_every == 0 and not last:
                with whole(run):
                    trackers.picture(run.done, run.processes.once(samples.write, run))
            if last or better or (out.checkpoint_every and run.done % out.checkpoint_every == 0):
                run.processes.once(_kept, run, held(run))
            elif run.updater.shards is not None and run.done == first + 1:
                held(run)  # what cannot be put together shows now, not at the first checkpoint
    return used


def _kept(run: Run, found: Held) -> None:
    check_there(run)
    snapshot(run, found)


@contextmanager
def whole(run: Run, wanted: bool = True) -> Iterator[None]:
    """Inside the block the weights of a sharded run are in the first process whole as well; all processes enter it."""
    if wanted and (shards := run.updater.shards) is not None:
        run.whole_weights = dict(shards.whole(run.updater.ema or run.updater.parameters))
    try:
        yield
    finally:  # else what comes after an error could take weights of an earlier update for those of now
        run.whole_weights = None

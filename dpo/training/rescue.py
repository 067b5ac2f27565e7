"""What is kept of updates that did not come to their end, and the words on it."""

from __future__ import annotations

import errno
import logging
import shlex
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

from dpo.common.command import of_launcher
from dpo.common.errors import Elsewhere, Stopped, UserError
from dpo.common.words import first_line
from dpo.data.batch import PairBatch
from dpo.settings.config import Config
from dpo.training import checkpoint, summary
from dpo.training.agreement import Disagreed
from dpo.training.parallel import Died
from dpo.training.run import Diverged, Run
from dpo.training.state import held, snapshot
from dpo.training.trackers import Trackers

OF_OTHERS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

log = logging.getLogger("dpo")


def goes_on(output: Path) -> str:
    """The command that goes on with the run in `output`, on as many processes of this machine as now."""
    local = of_launcher("LOCAL_WORLD_SIZE", 1)
    launcher = f"torchrun --nproc-per-node {local}" if local > 1 else "python"
    return f"{launcher} -m dpo.train --output {shlex.quote(str(output))} --resume latest"


def check_there(run: Run) -> None:
    """Raises UserError where the output folder is gone: made anew it would hold a checkpoint where nobody looks for it."""
    if not run.output.is_dir():
        raise UserError(f"{run.output} is gone: it was moved or deleted while the run went on; resume where it is now")


def is_logged(run: Run) -> bool:
    """Whether the figures of the last update belong into metrics.jsonl."""
    return run.done % run.config.output.log_every == 0 or run.done == run.total


def rescue(run: Run, trackers: Trackers, batches: Generator[PairBatch, None, None], ending: BaseException) -> None:
    """Drops the update in progress, writes a checkpoint of the last whole one, and logs how to go on after `ending`.

    A state that is not whole is not written: weights between two updates, or an update without its line in
    metrics.jsonl. Raises no Exception, which would take the place of the one that ended the run.
    """
    whole = run.whole and (trackers.logged == run.done or not is_logged(run))
    path = found = None
    if (cut := run.updater.shards is not None) and whole and (isinstance(ending, Diverged) or run.stopping):
        with suppress(Exception):  # all processes end at the same place: each gives its part
            run.drop()
            found = held(run)
    if not run.processes.first:
        with suppress(Exception):
            batches.close()
        return
    if isinstance(ending, Disagreed):
        log.warning("the processes have different weights: no checkpoint is written of them")
        whole = False
    try:
        batches.close()  # else another dying worker interrupts what follows
        if whole and (found is not None or not cut):
            run.drop()
            check_there(run)
            path = snapshot(run, found, emergency=True, diverged=isinstance(ending, Diverged))
    except Exception as error:  # the disk is full, or the device is dead
        log.warning("update %d could not be kept: no checkpoint can be written (%s)", run.done, first_line(error))
    if whole and cut and found is None:
        log.warning("each process holds a part of the weights, and not all were there to write a checkpoint")
    elif not whole and not isinstance(ending, Disagreed):
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
    log.warning("go on with: %s", goes_on(run.output))


def known(run: Run, ending: BaseException) -> BaseException:
    """`ending`, after `rescue`; where another process died, with words on what there is to go on from.

    That no checkpoint is there only the first process knows, which writes them: it may do so just now.
    """
    if not isinstance(ending, Died):
        return ending
    if checkpoint.listing(run.checkpoints):
        return Died("go on with --resume latest")
    return Died("no checkpoint was written yet: --resume latest starts anew") if run.processes.first else ending


def _record(run: Run, trackers: Trackers, ending: BaseException) -> None:
    """Writes how the updates ended into metrics.jsonl and the report."""
    if isinstance(ending, Stopped):
        trackers.event({"event": "interrupted", "step": run.done})
        summary.report(run, "interrupted", "stopped by a signal")
        return
    reason = (
        str(ending) if isinstance(ending, UserError | Elsewhere) else f"{type(ending).__name__}: {first_line(ending)}"
    )
    trackers.event({"event": "failed", "step": run.done, "message": reason})
    summary.report(run, "failed", reason)


def not_ours(error: Exception, config: Config) -> UserError | None:
    """The message on a file outside of the output folder; None where the error is one of writing the output."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str) or getattr(error, "errno", None) not in OF_OTHERS:
        return None
    if Path(name).resolve().is_relative_to(Path(config.output.output).expanduser().resolve()):
        return None
    return UserError(f"{name}: {getattr(error, 'strerror', error)}; mend that, then --resume latest")

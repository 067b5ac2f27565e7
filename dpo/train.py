"""Align a text-to-image diffusion model with preference pairs.

    python -m dpo.train                                                 the small world inside the package, on a CPU
    python -m dpo.train --preset sd15 --data pairs/ --output runs/sd15  Diffusion-DPO, Stable Diffusion 1.5, all weights
    python -m dpo.train --preset sdxl-lora --data pairs/ --method dde   DDE, SDXL, low-rank adapters
    python -m dpo.train --output runs/sd15 --resume latest              go on with a run
    torchrun --nproc-per-node 8 -m dpo.train --preset sd15 ...          the same run on eight GPUs
    python -m dpo.train --compat hf-sd15 <a diffusers command line>     another trainer's flags and meanings

From Python: `from dpo import align` (docs/api.md).

Read `train_step` below, then step.py (a micro-batch), objective.py (the methods) and training/loop.py (what surrounds
the updates).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.common import command
from dpo.common.errors import OutOfMemory, UserError

if TYPE_CHECKING:  # torch is imported only once the settings are checked
    from dpo.data.batch import PairBatch
    from dpo.pages.aligned import Aligned
    from dpo.settings.config import Config
    from dpo.training.parallel import Processes
    from dpo.training.run import Figures, Run


def train_step(run: Run, micro_batches: Iterable[PairBatch]) -> Figures:
    """One update from an effective batch: accumulate gradients over its micro-batches, clip, step. Returns its figures.

    The loss is the sum over pairs divided by the number of usable pairs in the effective batch, however the batch is
    cut into micro-batches and dealt out to processes (training/parallel.py sums their gradients in the last backward).
    DDE's table does not change during the update and is updated once, at its end. Nothing waits for the device before
    the figures are read. Raises `Diverged` for a loss or gradient that is not finite, before any weight has changed. With
    gradient release the update is made inside backward: see training/release.py.
    """
    correction, rate = run.correction(), run.learning_rate()
    usable = 0
    for batch, inputs in run.encoder.encoded(micro_batches):
        usable += int(batch.usable.sum())  # on the host: no synchronisation
        run.reduces(batch.last)
        if run.graphs is None:
            terms = run.step(inputs, correction, recorded=batch.recorded)
            run.whole = (
                run.updater.release is None
            )  # otherwise weights change from here on, until the update is counted
            run.updater.backward(terms.loss.sum() / run.nominal, rate, usable / run.nominal)
        else:  # the same two, replayed as one CUDA graph
            terms = run.graphs(inputs, correction, recorded=batch.recorded)
        run.table.gather(terms.table_sum, terms.table_count)
        run.metrics.add(terms, inputs.prob, inputs.usable)
    usable = run.gather(usable)
    norm = run.updater.grad_norm(usable / run.nominal)
    figures = run.metrics.read({"grad_norm": norm}, run.tables(correction), run.nominal)
    run.check_finite(figures)
    for one in run.following:
        figures |= one.figures()
    if usable:
        run.whole = False  # until the update is counted
        run.updater.update(rate, norm, run.done)
        run.table.commit()
        for one in run.following:
            one.after(figures)
    return figures


def align(config: Config | str | os.PathLike[str] | None = None, **settings: Any) -> Aligned:
    """Trains a run from Python, as the command does, and returns what came of it.

    `settings` are read as the flags of the same names: `preset` or `config` (a TOML file) may be among them, and without
    a model and data the small world inside the package is trained. To a Config they are changes.
    What is decided on the way goes to logging.getLogger("dpo"). Sets torch's seed, threads and TF32 as the settings
    say, for the whole process. Raises UserError for what a person can mend, and KeyboardInterrupt where Ctrl-C or
    SIGTERM ended the updates: a checkpoint is written before, and resume="latest" goes on from it.
    """
    from dpo.settings import flags
    from dpo.settings.config import Config, change

    if not isinstance(config, Config):
        config, notes = flags.asked(settings if config is None else {**settings, "config": config})
    else:
        config, notes = change(config, **{name: flags.plain(value) for name, value in settings.items()}), []
    command.spin_less()
    if to_its_end(config, notes) == command.INTERRUPTED:
        raise KeyboardInterrupt(f"stopped; resume='latest' goes on from the last checkpoint in {config.output.output}")
    from dpo.pages.aligned import read_aligned

    return read_aligned(Path(config.output.output).expanduser())


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when the run ended, 2 after a user's mistake (one line on stderr), 130 when interrupted."""
    words, rank = sys.argv[1:] if argv is None else argv, os.environ.get("RANK", "0")
    name = f"dpo.train, process {rank} of {os.environ.get('WORLD_SIZE')}" if rank != "0" else "dpo.train"
    return command.run(name, lambda: together(words))


def together(argv: Sequence[str]) -> int:
    """Trains as the command line says, alone or as one of torchrun's processes; the exit code."""
    if command.of_launcher("WORLD_SIZE", 1) == 1:
        return train(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch shows its stack where a process is gone
    from dpo.training import parallel

    with parallel.opened() as processes:
        return train(argv, processes)


def train(argv: Sequence[str], processes: Processes | None = None) -> int:
    """Trains as the command line says; the exit code. torch is imported only once the command line is checked."""
    from dpo.settings.flags import parse

    config, notes = parse(argv)
    from dpo.common import console

    console.setup(logging.INFO if processes is None or processes.first else logging.ERROR)
    return to_its_end(config, notes, processes)


def to_its_end(config: Config, notes: list[str], processes: Processes | None = None) -> int:
    """Trains the run of `config` to its end, and compares it with its start where that is asked for; the exit code.

    notes: lines for the log on how the settings were read. Raises UserError.
    """
    from dpo import evaluate
    from dpo.evaluating.flags import check_scorers
    from dpo.sampling import work as sampling
    from dpo.training import loop
    from dpo.training.parallel import Processes

    if config.output.evaluate_prompts:  # what is drawn at the end is looked at before hours of training
        sampling.prompts_of(sampling.Asked(model="", prompts=config.output.evaluate_prompts), ())
    check_scorers(config.output.evaluate, flag="--evaluate", cache_dir=config.model.cache_dir)
    processes = processes or Processes()
    config = loop.again(config, processes)
    if config.runtime.checkpointing == "auto":
        from dpo.planning import recompute

        config, line = recompute.decided(config, train_step, processes)
        notes = [*notes, line]
    try:
        return loop.train(config, notes, train_step, evaluate.evaluated, processes)
    except OutOfMemory as error:
        if not error.at_first:
            raise
        from dpo.planning import full

        raise UserError(f"{error}{full.instead(config, train_step, processes)}") from error


if __name__ == "__main__":
    code = main()
    if code == command.INTERRUPTED:
        # All files are written. Threads that still sample or decode would make the interpreter abort as it shuts down.
        logging.shutdown()
        os._exit(code)
    sys.exit(code)

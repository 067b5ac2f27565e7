"""Runs in the test's own process: the trainer without its command line's process."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo.common.files import write_text
from dpo.data.batch import of_update
from dpo.pages.folder import CONFIG_FILE
from dpo.settings.config import to_toml
from dpo.settings.flags import parse
from dpo.train import train_step
from dpo.training import build, checkpoint
from dpo.training.parallel import Processes
from dpo.training.run import Run
from dpo.training.state import snapshot
from dpo.training.trackers import open_trackers

QUIET = ["--workers", "0", "--validate-every", "0", "--checkpoint-every", "0"]


def make_run(model: str, pairs: str, output: Path, *flags: str, processes: Processes | None = None) -> Run:
    """A run that is ready for its first update (or, with --resume, for its next)."""
    config, notes = parse(["--model", model, "--data", pairs, "--output", str(output), *QUIET, *flags])
    return build.build(config, notes, processes)


def advance(run: Run, updates: int) -> list[dict]:
    """`updates` updates; the figures of each."""
    batches = run.batches()
    figures = []
    for _ in range(updates):
        figures.append(train_step(run, of_update(batches)))
        run.done += 1
        run.position += run.nominal
    batches.close()
    return figures


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters by name."""
    return {name: p.detach().clone() for name, p in zip(run.updater.names, run.updater.parameters, strict=True)}


def everything(run: Run) -> dict[str, torch.Tensor]:
    """Trained parameters, optimizer states, averaged weights and DDE's table, by name."""
    state = {f"policy.{name}": value for name, value in weights(run).items()}
    tensors, _ = checkpoint.pack(run.updater.optimizer.state_dict())
    state |= {f"optimizer.{name}": value.clone() for name, value in tensors.items()}
    state |= {f"ema.{name}": value for name, value in zip(run.updater.names, run.updater.ema)}
    return state | {f"tables.{name}": value.clone() for name, value in run.table.tensors().items()}


def leave(run: Run, updates: int, every: int) -> list[dict]:
    """`updates` updates, with the files that a run leaves of them; checkpoints after `every` so many. Their figures."""
    figures = []
    trackers = open_trackers(run.output)
    write_text(run.output / CONFIG_FILE, to_toml(run.config))
    for _ in range(updates):
        rate = run.learning_rate()
        figures += [found | {"learning_rate": rate, "seconds": 1.0} for found in advance(run, 1)]
        trackers.log(run.done, figures[-1])
        if run.done % every == 0:
            snapshot(run)
    trackers.close()
    return figures

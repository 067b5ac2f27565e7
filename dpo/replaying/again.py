"""Updates made again: a run built from its settings, put into a state, and brought forward by its own training step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dpo.data.batch import PairBatch, of_update
from dpo.settings.config import Config, change
from dpo.training import build, checkpoint, validation
from dpo.training.run import Figures, Run
from dpo.training.state import contents, held, restore

TrainStep: TypeAlias = Callable[[Run, Iterator[PairBatch]], Figures]

log = logging.getLogger("dpo")


def built(config: Config, saved: checkpoint.Checkpoint | None, *, held_out: bool) -> Run:
    """The run of `config` in the state of `saved`, at its start where that is None. Raises UserError.

    held_out: whether the held-out pairs are wanted. Without, they are not encoded; which pairs are held out stays.
    """
    data = config.data
    if not held_out and (data.validation_data is not None or data.validation_fraction is not None):
        config = change(config, validate_every=0, keep_best=False, patience=None)
    run = build.build(config, [], again=True)
    if saved is not None:
        restore(run, saved)
    return run


def kept(run: Run) -> checkpoint.Checkpoint:
    """The state of a run in host memory, as a checkpoint on no disk."""
    tensors, state = contents(run, held(run))
    copies = {
        group: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        for group, values in tensors.items()
    }
    name = Path(f"the state after update {run.done}")  # as messages call it
    return checkpoint.Checkpoint(name, {k: v for k, v in copies.items() if v}, copy.deepcopy(state))


def updates(run: Run, until: int, train_step: TrainStep, without: Collection[int] = ()) -> Iterator[Figures]:
    """Makes the run's updates up to number `until`; the figures of each, as metrics.jsonl has them.

    without: keys of pairs that are left out, as if an image of theirs could not be used. Raises Diverged.
    """
    with closing(run.batches()) as batches:
        stream = (holed(batch, without) for batch in batches) if without else batches
        while run.done < until:
            rate = run.learning_rate()
            figures = train_step(run, of_update(stream))
            run.count()
            yield figures | {"learning_rate": rate}


def holed(batch: PairBatch, keys: Collection[int]) -> PairBatch:
    """The micro-batch with a hole in the place of each pair of these `keys`; the batch itself is left as it is."""
    gone = torch.tensor([key in keys for key in batch.keys.tolist()])
    if not gone.any():
        return batch

    def blank(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        rows = gone.repeat(len(values) // len(gone))  # both halves, or images without partners
        return values.masked_fill(rows.view(-1, *[1] * (values.dim() - 1)), 0)

    return replace(
        batch,
        prob=batch.prob.masked_fill(gone, 0.5),
        usable=batch.usable.masked_fill(gone, 0.0),
        pixels=blank(batch.pixels),
        latent_mean=blank(batch.latent_mean),
        latent_std=blank(batch.latent_std),
    )


def held_out(run: Run) -> Figures | None:
    """Held-out accuracy of the weights that the run would save; None where the run measures none."""
    if run.held_out is None:
        return None
    with run.updater.averaged():
        return validation.accuracy(run.step, run.held_out)

"""--keep-best: the weights of the best held-out accuracy become the result, and not the last ones.

Who takes the best of many noisy accuracies finds it too high. So one half of the held-out pairs chooses, and what is
reported is the accuracy of the other half. More is better; of equal accuracies the lower mean difference, then the later.
The best weights are those of a checkpoint, which stays until a better one is found; every checkpoint says which it is.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import beside, remove, sync_folder
from dpo.common.words import digest
from dpo.data.order import keyed_numbers
from dpo.data.pairs import Source
from dpo.settings.config import Config
from dpo.training import checkpoint, validation

if TYPE_CHECKING:
    from dpo.training.run import Figures, Run

log = logging.getLogger("dpo")

FEWEST = 8  # pairs in a half
UNEVEN = 0.25  # the smallest share of the pairs in a half where whole captions are kept together
MEASURED = 10  # held-out accuracies of a run where --validate-every is left open
WEIGHTS = ("policy", "ema")  # the groups of a checkpoint that make a result


@dataclass
class Best:
    """The best weights so far, and how long ago they were found."""

    choosing: Tensor  # [N] bool: the labelled held-out pairs that choose; the others are reported
    measured: str  # digest of what is measured: accuracies of other pairs or draws do not compare
    patience: int | None  # accuracies without gain that end the run
    step: int | None = None  # the update that the best weights are of; None before the first accuracy
    figures: dict[str, Any] = field(default_factory=dict)  # of that update
    waited: int = 0  # accuracies since then
    checksums: dict[str, str] = field(default_factory=dict)  # of the files of its weights

    @property
    def ended(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def is_beaten_by(self, figures: Figures) -> bool:
        if self.step is None:
            return True
        accuracy, difference = "choosing_accuracy", "choosing_difference"
        new, old = (figures[accuracy], -figures[difference]), (self.figures[accuracy], -self.figures[difference])
        return new >= old

    def take(self, step: int, figures: Figures) -> None:
        """Makes the weights of update `step` the best."""
        self.step, self.figures, self.waited, self.checksums = step, figures, 0, {}

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {
            "step": self.step,
            "figures": self.figures,
            "waited": self.waited,
            "checksums": self.checksums,
            "measured": self.measured,
        }


def check(config: Config, held_out: Source | None, steps: int) -> None:
    """Raises UserError where a run of `steps` updates has nothing to choose by or from."""
    out = config.output
    if not out.keep_best:
        return
    if held_out is None:
        raise UserError(
            "--keep-best chooses by held-out accuracy, and no pairs are held out: give --validation-data or "
            "--validation-fraction 0.2, or leave --keep-best out"
        )
    assert out.validate_every, "decided before"
    count = math.ceil(steps / out.validate_every)
    if count < 2:
        raise UserError(
            f"--keep-best chooses between held-out accuracies, and this run of {steps} updates has one: lower --validate-every "
            f"{out.validate_every}"
        )
    if out.patience is not None and out.patience + 1 >= count:
        raise UserError(
            f"--patience {out.patience} never ends a run of {count} held-out accuracies: lower it, or --validate-every "
            f"{out.validate_every}"
        )


def choosing_half(pairs: np.ndarray, captions: np.ndarray, by: str) -> np.ndarray:
    """bool [n]: the keyed half that chooses, of pairs with these keys [n] and keys of captions [n], both int64.

    by: as --validation-by; "auto" keeps captions whole where the halves come out even enough.
    """
    for keys in {"caption": (captions,), "pair": (pairs,)}.get(by, (captions, pairs)):
        numbers = keyed_numbers(keys)
        values, counts = np.unique(numbers, return_counts=True)
        reached = np.cumsum(counts)
        cut = int(np.abs(2 * reached - len(keys)).argmin())
        chosen = numbers <= values[cut]
        if UNEVEN * len(keys) <= chosen.sum() <= (1 - UNEVEN) * len(keys):
            break
    return chosen


def begin(run: Run, saved: checkpoint.Checkpoint | None) -> Best | None:
    """The best of a run that was just built, as its checkpoint has it; None where the last weights are the result.

    Raises UserError where too few pairs are held out, or the best weights so far are not there any more.
    """
    if not run.config.output.keep_best:
        return None
    held, source = run.held_out, run.held_out_source
    labelled = 0 if held is None else int(held.labelled.sum())
    if labelled < 2 * FEWEST or held is None or source is None:
        raise UserError(
            f"--keep-best wants {2 * FEWEST} held-out pairs with a preferred side, half to choose by and half to report, and "
            f"{labelled} can be used: hold out more (--validation-fraction), or leave --keep-best out"
        )
    known = held.labelled.numpy()
    keys, captions = held.keys.numpy()[known], source.caption_keys()[known]
    chosen = choosing_half(keys, captions, run.config.data.validation_by)
    count = int(chosen.sum())
    if min(count, labelled - count) < FEWEST:
        raise UserError(
            f"--keep-best: whole captions give halves of {count} and {labelled - count} held-out pairs, and each wants {FEWEST}: "
            "use --validation-by pair, or leave --keep-best out"
        )
    whole = not set(captions[chosen]) & set(captions[~chosen])
    log.info(
        "keep-best: %d held-out pairs choose the update, the other %d are reported (%s)",
        count, labelled - count, "no caption is in both" if whole else "by pair: a caption may be in both",
    )  # fmt: skip
    measured = digest(str(held.draws), str(run.config.runtime.seed), *map(str, sorted(keys)), *map(str, keys[chosen]))
    best = Best(torch.from_numpy(chosen), measured, run.config.output.patience)
    before = saved.state.get("best") if saved is not None else None
    if saved is None or not before or before["step"] is None:
        return best
    if before["measured"] != measured:
        log.warning(
            "keep-best: other pairs are held out than before: the best so far, of update %d, is let go", before["step"]
        )
        return best
    own = {name: value for name, value in saved.state["checksums"].items() if name in WEIGHTS}
    best.step, best.figures, best.waited = before["step"], before["figures"], before["waited"]
    best.checksums = before["checksums"] or own  # a checkpoint of the best weights does not know its own
    _find(best, saved.path.parent)
    return best


def _find(best: Best, near: Path) -> Path:
    """The checkpoint of the best weights: in the folder `near`, or where branches were gone back from.

    Raises UserError where it is not there with those weights.
    """
    assert best.step is not None, "asked for once there is one"
    for root in _roots(near):
        place = checkpoint.folder_of(root, best.step)
        if best.checksums == weights_of(place):
            return place
    raise UserError(
        f"the best weights so far, of update {best.step}, are not in {checkpoint.folder_of(near, best.step)} any more: put that "
        "back, resume an earlier checkpoint, or go on with --no-keep-best, which makes the last weights the result"
    )


def _roots(near: Path) -> Iterator[Path]:
    """Folders of checkpoints: this one, and those of its run beside it."""
    yield near
    top = near.parent if near.name.startswith(checkpoint.ABANDONED.format("")) else near
    yield from (top, *sorted(top.glob(checkpoint.ABANDONED.format("*"))))


def weights_of(place: Path) -> dict[str, str]:
    """The checksums of the weights in a checkpoint, by group, as its state says; empty where there is none."""
    sums = checkpoint.read_state(place).get("checksums")
    return {name: value for name, value in sums.items() if name in WEIGHTS} if isinstance(sums, dict) else {}


def bring(run: Run) -> None:
    """Copies the checkpoint of the best weights to the others, where a run goes on from one that lies elsewhere.

    Raises UserError where it is not there any more, and OSError.
    """
    if run.best is None or run.best.step is None or run.resumed is None:
        return
    place = checkpoint.folder_of(run.checkpoints, run.best.step)
    if weights_of(place) == run.best.checksums:
        return
    found, part = _find(run.best, run.resumed.parent), beside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(found, part)
        part.replace(place)
        sync_folder(place.parent)
    finally:
        remove(part)
    log.info("keep-best: %s was copied to %s", found, place)


def measure(run: Run, pairs: validation.HeldOut) -> tuple[Figures, bool]:
    """Held-out accuracy of the weights that are saved, and whether these are the best so far: then a checkpoint is due.

    Of averaged weights, which is said, where there are any. With --keep-best it is that of the half that is reported;
    that of the other half stands beside it. All processes must ask, and all get the same answer.
    """
    with run.updater.averaged():
        differences = validation.differences(run.step, pairs).mean(0)
    said = {"weights": "averaged"} if run.updater.ema else {}
    best = run.best
    if best is None:
        return {**validation.figures(differences), **said}, False
    chosen = validation.figures(differences[best.choosing])
    figures = {**validation.figures(differences[~best.choosing]), **said}
    figures |= {f"choosing_{name}": chosen[f"heldout_{name}"] for name in ("accuracy", "difference", "pairs")}
    better = run.processes.objects(best.is_beaten_by(figures))[0]
    if better:
        best.take(run.done, figures)
    else:
        best.waited += 1
    if best.ended and run.done < run.total:
        log.info(
            "the run ends after update %d of %d: %d held-out accuracies without gain since update %d (--patience)",
            run.done, run.total, best.waited, best.step,
        )  # fmt: skip
    return figures, better


def keep(run: Run) -> None:
    """Makes the best weights those of a run whose updates are made, in the first process, which writes the result.

    Raises UserError where they cannot be read back.
    """
    best, updater = run.best, run.updater
    if best is None or best.step is None or not run.processes.first:
        return
    if best.step != run.done:
        place = _find(best, run.checkpoints)
        try:
            found = checkpoint.load(place)
        except checkpoint.Damaged as error:
            raise UserError(
                f"the best weights, of update {best.step}, cannot be read ({error}): --resume latest --no-keep-best makes the "
                "last ones the result"
            ) from error
        checkpoint.copy_into(
            dict(zip(updater.names, updater.parameters, strict=True)), found.tensors["policy"], "policy"
        )
        if updater.ema:
            checkpoint.copy_into(dict(zip(updater.names, updater.ema, strict=True)), found.tensors["ema"], "averages")
        run.shown = best.step
    log.info(
        "keep-best: update %d of %d is the result: held-out accuracy %.3f of the %d pairs that chose it, %.3f of the other %d",
        best.step, run.done, best.figures["choosing_accuracy"], best.figures["choosing_pairs"],
        best.figures["heldout_accuracy"], best.figures["heldout_pairs"],
    )  # fmt: skip


def told(run: Run) -> dict[str, Any] | None:
    """What the summary says of the weights that were kept; None before the end, or where the last ones are the result."""
    best = run.best
    if best is None or best.step is None or not (best.ended or run.done >= run.total):
        return None
    return {"step": best.step, "of": run.done, "early": best.ended and run.done < run.total, **best.figures}

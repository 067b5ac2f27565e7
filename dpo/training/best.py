"""--keep-best: the weights of the best held-out accuracy become the result, and not the last ones.

Who takes the best of many noisy accuracies finds it too high. So one half of the held-out pairs chooses, and what is
reported is the accuracy of the other half. More is better; of equal accuracies the lower mean difference, then the later.
The best weights are those of a checkpoint, which stays until a better one is found; every checkpoint says which it is.
choice.py does that in a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.data.order import keyed_numbers
from dpo.data.pairs import Source
from dpo.settings.config import Config
from dpo.training import checkpoint

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

    def is_beaten_by(self, figures: Mapping[str, Any]) -> bool:
        if self.step is None:
            return True
        accuracy, difference = "choosing_accuracy", "choosing_difference"
        new, old = (figures[accuracy], -figures[difference]), (self.figures[accuracy], -self.figures[difference])
        return new >= old

    def take(self, step: int, figures: Mapping[str, Any]) -> None:
        """Makes the weights of update `step` the best."""
        self.step, self.figures, self.waited, self.checksums = step, dict(figures), 0, {}

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
            f"--keep-best chooses between held-out accuracies, and this run of {number_of(steps, 'updates')} has one: lower --validate-every "
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


def find(best: Best, near: Path) -> Path:
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

"""What changes from one update to the next in a run's logit: beta by target, and KTO's centre.

    a    <- 0.99 a + 0.01 (mean |dloss/dz| of the update),       at first that of all pairs before the first update
    beta <- beta exp(0.01 (a - target)),                         within a quarter and four times the start, from update 100

The mean is over the pairs of the update of all processes, so neither the cut into micro-batches nor the number of
processes matters. With hard labels and the sigmoid |dloss/dz| is sigmoid(-z): 1/2 at the start, where nothing is
learned, and 0 where every pair is decided; a larger beta makes it smaller. Soft and smoothed labels begin below 1/2
(dpo.training.outset). Before update 100 it says only that training has begun.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

DECAY, RATE, FIRST, SPAN = 0.99, 0.01, 100, 4.0


@dataclass
class Strength:
    """beta and the mean that it follows; a part of the checkpoint, on the host in float64."""

    name: ClassVar[str] = "beta"
    beta: Tensor  # 0-d, what the step reads
    start: float  # the setting
    target: float
    now: float
    average: float
    updates: int = 0

    def figures(self) -> dict[str, float]:
        """What the next update is made with."""
        return {"beta": self.now}

    def after(self, figures: Mapping[str, Any]) -> None:
        """Follows an update that was made, from its figures. An update without labelled pairs says nothing."""
        if (factor := figures["gradient_factor"]) is None:
            return
        self.average = DECAY * self.average + (1 - DECAY) * factor
        self.updates += 1
        if self.updates >= FIRST:
            moved = self.now * math.exp(RATE * (self.average - self.target))
            self._put(min(max(moved, self.start / SPAN), self.start * SPAN))

    def as_json(self) -> dict[str, float | int]:
        """What a checkpoint holds."""
        return {"beta": self.now, "average": self.average, "updates": self.updates, "start": self.start}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint, as far from the setting as it had come: a changed --beta moves it along."""
        self.average, self.updates = float(saved["average"]), int(saved["updates"])
        moved = float(saved["beta"]) * (self.start / float(saved.get("start", self.start)))  # earlier versions lack it
        self._put(min(max(moved, self.start / SPAN), self.start * SPAN))

    def _put(self, beta: float) -> None:
        self.now = beta
        self.beta.fill_(beta)


@dataclass
class Centre:
    """KTO's centre: what an image of the previous update had gained on average over the reference, at least 0.

    Of all its images and processes, where the published code takes those of a micro-batch. 0 at first. Of pairs there
    are as many of both sides; of images alone the figures say how many are disliked.
    """

    name: ClassVar[str] = "kto_center"
    center: Tensor  # 0-d, in units of the logit, what the step reads
    beta: float
    gain: float = 0.0  # mean of reference error minus policy error, at least 0

    def figures(self) -> dict[str, float]:
        """What the next update is made with."""
        return {"kto_center": self.beta * self.gain}

    def after(self, figures: Mapping[str, Any]) -> None:
        """Follows an update that was made, from its figures. An update without pairs says nothing."""
        disliked = figures.get("disliked_images")
        counts = (1, 1) if disliked is None else (figures["pairs"] - disliked, disliked)
        sides = zip((figures["win_error_vs_reference"], figures["lose_error_vs_reference"]), counts, strict=True)
        if known := [(error, count) for error, count in sides if error is not None]:
            self._put(max(-sum(error * count for error, count in known) / sum(count for _, count in known), 0.0))

    def as_json(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"gain": self.gain}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._put(float(saved["gain"]))

    def _put(self, gain: float) -> None:
        self.gain = gain
        self.center.fill_(self.beta * gain)

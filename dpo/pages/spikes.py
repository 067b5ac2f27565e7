"""Updates of a run that stand out: those whose loss or gradient norm is far above what it was just before."""

from __future__ import annotations

import shlex
from typing import NamedTuple

import numpy as np

from dpo.pages.folder import RunFolder

FIGURES = ("loss", "grad_norm")
BEFORE = 50  # logged updates that an update is compared with
FEWEST = 10  # of these; with fewer nothing is said
TIMES, DEVIATIONS = 3.0, 10.0  # a spike is above both, in medians and in median absolute deviations over the median
MOST = 5  # spikes that are named


class Spike(NamedTuple):
    """An update at which a figure stood out."""

    update: int
    figure: str
    value: float
    usual: float  # the median of the updates before

    @property
    def times(self) -> float:
        return self.value / self.usual if self.usual > 0 else float("inf")


def spikes(run: RunFolder) -> list[Spike]:
    """The updates that stand out most, at most MOST, in the order of the run; each with the figure that does so most.

    A spike is at least TIMES the median of the BEFORE updates logged before it, and DEVIATIONS of their median absolute
    deviations above it. Both: a figure that hardly varies is not a spike for leaving its rut, nor one that always jumps.
    """
    found: dict[int, Spike] = {}
    for name in FIGURES:
        steps, values = run.series(name)
        usual, spread = _before(values)
        high = (values >= TIMES * usual) & (values > usual + DEVIATIONS * spread)
        for at in np.flatnonzero(high):
            one = Spike(int(steps[at]), name, float(values[at]), float(usual[at]))
            if one.update not in found or found[one.update].times < one.times:
                found[one.update] = one
    most = sorted(found.values(), key=lambda spike: -spike.times)[:MOST]
    return sorted(most, key=lambda spike: spike.update)


def _before(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and median absolute deviation [N] of the BEFORE values before each one [N]; nan where there are too few."""
    usual, spread = np.full((2, len(values)), np.nan)
    for at in range(FEWEST, min(BEFORE, len(values))):
        usual[at] = np.median(values[:at])
        spread[at] = np.median(np.abs(values[:at] - usual[at]))
    if len(values) > BEFORE:
        windows = np.lib.stride_tricks.sliding_window_view(values[:-1], BEFORE)
        usual[BEFORE:] = np.median(windows, axis=1)
        spread[BEFORE:] = np.median(np.abs(windows - usual[BEFORE:, None]), axis=1)
    return usual, spread


def command(run: RunFolder, spike: Spike) -> str:
    """What to type to see why."""
    return f"python -m dpo.replay {shlex.quote(str(run.folder))} --update {spike.update}"

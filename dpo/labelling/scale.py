"""From scores to labels: several scorers' votes on one scale, ties by margin, probabilities by a temperature.

One scorer's difference stands on its own printed scale, and is multiplied by its own temperature. A vote is the weighted
mean of scores that are standardised over the set (mean 0, spread 1 over all images of all pairs), so that no scorer counts
more because its scale is wider; its temperature is 1 unless one is given or fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo.common.errors import UserError
from dpo.common.stats import independent, share_interval
from dpo.common.words import digest

LEAST = 20  # labelled pairs on either side of the split, below which no temperature is fitted
SURE = 50.0  # logit of a median pair beyond which labels are called separable
ROUNDS = 200  # halvings


class Voter(NamedTuple):
    """A scorer as it counts: standardised by `mean` and `spread` where there are several."""

    name: str
    weight: float
    sign: float  # -1 where lower is better
    mean: float = 0.0
    spread: float = 1.0


def voters(
    names: Sequence[str], weights: Sequence[float], signs: Sequence[float], scores: Sequence[np.ndarray]
) -> list[Voter]:
    """The scorers with what standardises their scores [M] each, nan where there is none; one alone stays as it is.

    Raises UserError for a scorer that gives every image the same score.
    """
    found = []
    for name, weight, sign, values in zip(names, weights, signs, scores, strict=True):
        known = values[np.isfinite(values)]
        if not len(known):
            raise UserError(f"{name} gave no image a finite number: it cannot label them, name another scorer")
        spread = float(known.std())
        if not spread > 0:
            raise UserError(
                f"{name} gives all {len(known)} images the same score: it cannot label them, name another scorer"
            )
        one = Voter(name, weight, sign)
        found.append(one if len(names) == 1 else one._replace(mean=float(known.mean()), spread=spread))
    return found


def combined(chosen: Sequence[Voter], scores: Sequence[np.ndarray]) -> np.ndarray:
    """One score [M] for each image, higher is better: of one scorer its own (with its sign), else the weighted mean."""
    if len(chosen) == 1:
        return chosen[0].sign * scores[0]
    total = math.fsum(one.weight for one in chosen)
    parts = [one.weight / total * one.sign * (s - one.mean) / one.spread for one, s in zip(chosen, scores, strict=True)]
    return np.sum(parts, axis=0)


def labels(differences: np.ndarray, margin: float) -> np.ndarray:
    """[n] of 0, 0.5, 1: whether the first image is better, or as good within `margin`; nan stays."""
    found = np.where(differences > 0, 1.0, 0.0)
    found[np.abs(differences) <= margin] = 0.5
    return np.where(np.isfinite(differences), found, np.nan)


def probabilities(differences: np.ndarray, temperature: float) -> np.ndarray:
    """[n] sigmoid(temperature * difference)."""
    return 0.5 * (1.0 + np.tanh(0.5 * temperature * differences))


def log_likelihood(p: np.ndarray, said: np.ndarray) -> float:
    """Mean over pairs of the log-likelihood of labels `said` [n] in [0, 1] under probabilities p [n]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(said > 0, said * np.log(p), 0.0) + np.where(said < 1, (1 - said) * np.log1p(-p), 0.0)
    return float(parts.mean())


class Fit(NamedTuple):
    """A temperature and what the held-out half of the labelled pairs says of it: mean log-likelihoods of a pair."""

    temperature: float
    pairs: int  # that it was fitted on
    held_out: int
    before: float  # by the temperature that would have been taken
    after: float
    sure: float  # by hard labels, all of which are taken for as sure as they were right on the pairs of the fit


def halves(known: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the labelled pairs `known` [n] fit a temperature and which judge it, bool [n] each, by prompt.

    captions: [n] int64 keys. Raises UserError for too few on either side.
    """
    out = np.array([int(digest("temperature", str(key))[:8], 16) % 2 == 1 for key in captions.tolist()], dtype=bool)
    fit, held = known & ~out, known & out
    if min(fit.sum(), held.sum()) < LEAST:
        raise UserError(
            f"--fit-temperature needs {2 * LEAST} labelled pairs of different prompts, there are {int(known.sum())}: give "
            "--temperature, or --fit-temperature PAIRS with labelled ones"
        )
    return fit, held


def fitted(differences: np.ndarray, said: np.ndarray, captions: np.ndarray, before: float) -> Fit:
    """The temperature of the largest likelihood on one half of the labelled pairs; the other half, by prompt, judges it.

    differences, said: [n], nan where there is none; said in [0, 1]; captions: [n] int64, a key of each pair's caption.
    Raises UserError for too few labelled pairs, and where the labels go against the scores.
    """
    fit, held = halves(np.isfinite(differences) & np.isfinite(said), captions)
    temperature = _largest(differences[fit], said[fit])
    right = np.where(differences[fit] > 0, said[fit], 1 - said[fit])
    share = float(np.clip(right.mean(), 0.5 / fit.sum(), 1 - 0.5 / fit.sum()))
    of_hard = np.where(differences[held] > 0, share, 1 - share)
    return Fit(
        temperature,
        int(fit.sum()),
        int(held.sum()),
        log_likelihood(probabilities(differences[held], before), said[held]),
        log_likelihood(probabilities(differences[held], temperature), said[held]),
        log_likelihood(of_hard, said[held]),
    )


def _largest(differences: np.ndarray, said: np.ndarray) -> float:
    """Where the likelihood, which is concave in the temperature, has its top: its slope falls through 0 there."""

    def slope(temperature: float) -> float:
        return float((differences * (said - probabilities(differences, temperature))).sum())

    if slope(0.0) <= 0:
        raise UserError(
            "--fit-temperature: the labels do not follow the scores (the best temperature is not above 0): name another "
            "scorer, or give --temperature"
        )
    most = SURE / float(np.median(np.abs(differences[differences != 0])))
    if slope(most) >= 0:
        raise UserError(
            "--fit-temperature: every label follows the scores, so no temperature is too large: give --temperature, or "
            "take --labels hard"
        )
    low, high = 0.0, most
    for _ in range(ROUNDS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 0.5 * (low + high)


@dataclass(frozen=True)
class Agreement:
    """How often labels agree with older ones, over the pairs where neither is a tie."""

    pairs: int
    share: float
    interval: tuple[float, float]  # 95 %


def agreement(new: np.ndarray, old: np.ndarray, captions: np.ndarray) -> Agreement | None:
    """New labels [n] against old ones [n] (in [0, 1], nan: none); captions: [n] int64 keys. None without such pairs.

    Wilson's interval with the number of independent pairs that has the same error: pairs of one caption go together.
    """
    both = np.isfinite(new) & np.isfinite(old) & (new != 0.5) & (old != 0.5)
    if not both.any():
        return None
    right = ((new > 0.5) == (old > 0.5))[both].astype(float)
    return Agreement(len(right), float(right.mean()), share_interval(*independent(right, captions[both])))

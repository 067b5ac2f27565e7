"""How often one model is preferred to another: by the majority of raters, and by their votes. Two figures, never mixed.

Prompts are what is sampled, so every figure is averaged inside a prompt first. Two errors make the interval: prompts are
resampled, and the share of the raters, who are few and vote on many prompts, is added draw by draw as a Student's t
(as dpo/scorers/compare.py does with training seeds). Resampling raters themselves would draw one twice into the same
majority, which is then less of a majority: it covers too much by far where votes are mostly chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo.scorers.compare import (
    FEWEST,
    Besides,
    Interval,
    advantage_interval,
    mean_interval,
    share,
    sign_test,
)
from dpo.voting.tally import Votes

DECIDING = 10  # prompts on the smaller side below which resampling says too little: all wins stay all wins
ROUNDING = 1e-9  # of a sum of squares


@dataclass(frozen=True)
class Rate:
    """How often the later model of a pair is preferred."""

    win_rate: float  # a tie counts one half
    interval: Interval  # 95 %, over prompts and raters
    ties: float  # share of the majorities, or of the votes, that are none
    prompts: int
    cases: int  # majorities (items), or votes


@dataclass(frozen=True)
class Compared:
    """Two models by one question."""

    majority: Rate
    votes: Rate
    raters: int
    fewest: int  # votes on an item
    most: int
    p_sign: float  # two-sided sign test over prompts by their majorities, those without one dropped


def compared(found: Votes, *, seed: int = 0, resamples: int = 4000) -> Compared:
    """Majority's and votes' win rate of a pair's votes, at least one."""
    items, item = np.unique(found.item, return_inverse=True)  # [I]
    counts = np.bincount(item)
    sums = np.bincount(item, found.value)
    prompts, prompt = np.unique(found.prompt[np.unique(found.item, return_index=True)[1]], return_inverse=True)
    weight = 1.0 / (np.bincount(prompt)[prompt] * len(prompts))  # [I], of an item in the mean over prompts
    raters = np.unique(found.rater, return_inverse=True)[1]

    def over_prompts(of_item: np.ndarray) -> np.ndarray:
        return np.bincount(prompt, of_item) / np.bincount(prompt)

    def rate(of_item: np.ndarray, of_vote: np.ndarray, ties: np.ndarray, cases: int) -> Rate:
        mine = of_vote - (np.bincount(item, of_vote) / counts)[item]  # within its item: prompts are another error
        besides = rater_error(mine * weight[item], raters)
        advantages = over_prompts(of_item)
        return Rate(
            share(math.fsum(advantages) / len(advantages)),
            win_interval(advantages, cases, besides, seed=seed, resamples=resamples),
            float(over_prompts(ties).mean()),
            len(prompts),
            cases,
        )

    majority = np.sign(sums)
    without = majority[item] - np.sign(sums[item] - found.value)  # what one vote makes of its item's majority
    even = np.bincount(item, found.value == 0) / counts
    by_prompt = np.sign(over_prompts(majority))
    return Compared(
        majority=rate(majority, without, (majority == 0).astype(float), len(items)),
        votes=rate(sums / counts, found.value / counts[item], even, len(item)),
        raters=int(raters.max()) + 1,
        fewest=int(counts.min()),
        most=int(counts.max()),
        p_sign=sign_test(int((by_prompt > 0).sum()), int((by_prompt < 0).sum())),
    )


def rater_error(parts: np.ndarray, rater: np.ndarray) -> Besides | None:
    """The error of a sum of `parts` [N], one a vote, that comes from who the raters (int [N]) happen to be.

    It is what the raters' own sums scatter beyond what single votes would make them scatter. None for one rater, of
    whom nobody knows how far the next would be from them, and where nothing is left.
    """
    count = len(np.unique(rater))
    if count < 2:
        return None
    sums = np.bincount(rater, parts)
    alone = float(parts @ parts)
    beyond = float(sums @ sums) - alone
    return Besides(math.sqrt(count / (count - 1) * beyond), count - 1) if beyond > ROUNDING * alone else None


def win_interval(
    advantages: np.ndarray, cases: int, besides: Besides | None = None, *, seed: int = 0, resamples: int = 4000
) -> Interval:
    """95 % interval of a win rate from the advantages -1..1 of prompts [P], of so many cases in all."""
    decided = min((advantages > 0).sum(), (advantages < 0).sum())
    options: dict[str, int] = {"seed": seed, "resamples": resamples}
    if abs(advantages).min() == 1 and not decided:  # all prompts agree: no rater made a difference to any
        besides = None
    if decided >= DECIDING:
        found = mean_interval(advantages, besides=besides, **options)
        assert found is not None and DECIDING >= FEWEST, "enough prompts"
        return share(found[0]), share(found[1])
    return advantage_interval(advantages, cases, besides=besides, **options)

"""How far raters agree: with each other, with themselves, with the left-hand side; and what they make of many models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo.common.stats import bradley_terry, exact_interval
from dpo.scorers.compare import Besides, Interval, holm, keyed, mean_interval, percentiles, resampled
from dpo.voting.rates import rater_error
from dpo.voting.tally import Votes

SIGNIFICANT = 0.05
ROUGHLY = 1e-4  # change that ends the iteration for a resample's strengths


@dataclass(frozen=True)
class Share:
    """A counted share with its exact 95 % interval."""

    hits: int
    of: int
    interval: Interval

    @property
    def share(self) -> float:
        """0 to 1; one half of nothing counted."""
        return self.hits / self.of if self.of else 0.5


def counted(hits: int, of: int) -> Share:
    """A share and its interval, which is 0 to 1 where nothing was counted."""
    return Share(int(hits), int(of), exact_interval(int(hits), int(of)))


# --- with each other ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's nominal alpha: 1 for raters who always agree, 0 for votes by chance, below for those who oppose."""

    alpha: float | None  # None where all votes are equal or no item has two: agreement then has no measure
    interval: Interval | None  # 95 %, over prompts, for these raters
    items: int  # with two votes or more
    votes: int  # on those


def alpha(found: Votes, *, seed: int = 0, resamples: int = 2000) -> Alpha:
    """Agreement of the votes on each item (K. Krippendorff, Content Analysis, 2004); a tie is a value of its own.

    The interval is a studentised bootstrap over prompts of what each of them adds to alpha: percentiles of resampled
    alphas cover 90 to 95 % in simulated studies where this covers 93 to 96 %.
    """
    items, by_prompt = _parts(found)
    apart, counts = by_prompt[:, 0].sum(), by_prompt[:, 1:].sum(0)
    votes = counts.sum()
    chance = votes**2 - (counts**2).sum()  # ordered pairs of votes that differ, if all were shuffled, times votes - 1
    if chance == 0:
        return Alpha(None, None, items, int(votes))
    value = 1 - (votes - 1) * apart / chance
    slopes = np.array([1 - votes, *(apart * (2 * (votes - 1) * (votes - counts) / chance - 1))]) / chance
    between = mean_interval(len(by_prompt) * (by_prompt @ slopes), seed=seed, resamples=resamples)
    centre = float(by_prompt.sum(0) @ slopes)
    interval = None if between is None else (value + between[0] - centre, min(1.0, value + between[1] - centre))
    return Alpha(float(value), interval, items, int(votes))


def _parts(found: Votes) -> tuple[int, np.ndarray]:
    """The number of items with two votes or more, and what alpha is made of by prompt: [P, 4].

    Their disagreement, which for an item with m votes is the number of ordered pairs of them that differ, over m - 1; and
    how many of their votes are for the earlier model, a tie, for the later.
    """
    items, first, item = np.unique(found.item, return_index=True, return_inverse=True)
    table = np.zeros((len(items), 3))
    np.add.at(table, (item, found.value.astype(int) + 1), 1)
    count = table.sum(1)
    paired = count > 1
    apart = (count**2 - (table**2).sum(1)) / np.maximum(count - 1, 1)
    prompts, prompt = np.unique(found.prompt[first][paired], return_inverse=True)
    by_prompt = np.zeros((len(prompts), 4))
    np.add.at(by_prompt, prompt, np.concatenate([apart[:, None], table], 1)[paired])
    return int(paired.sum()), by_prompt


# --- each rater --------------------------------------------------------------------------------------------------------


def with_itself(repeats: Sequence[tuple[str, bool]]) -> tuple[Share, dict[str, Share]]:
    """How often the same was answered to a question asked again, of all and by rater; from `tally.repeated`."""
    return _by_rater(repeats)


def with_majority(found: Votes, names: Sequence[str]) -> tuple[Share, dict[str, Share]]:
    """How often a vote is that of the majority of the other raters, of all and by rater.

    A vote that is a tie, and others without a majority, are left out.
    """
    _, item = np.unique(found.item, return_inverse=True)
    others = np.sign(np.bincount(item, found.value)[item] - found.value)
    rows = np.flatnonzero((others != 0) & (found.value != 0))
    return _by_rater([(names[found.rater[row]], bool(others[row] == found.value[row])) for row in rows])


@dataclass(frozen=True)
class Sides:
    """Where the chosen images stood. Sides are balanced over all raters, not within one: who likes a model that stood more often
    on the left has chosen more on the left, without a habit."""

    all: Share
    by_rater: dict[str, Share]
    biased: dict[str, float]  # raters with a habit: the p-value of Fisher's exact test, adjusted for all raters (Holm)


def sides(found: Votes, names: Sequence[str]) -> Sides:
    """How often the chosen image stood on the left, of all votes but ties, and by rater.

    A rater has a habit where which model is chosen depends on where it stands: one who likes a model takes it on the left as often
    as on the right.
    """
    rows = np.flatnonzero(found.value != 0)
    whole, by_rater = _by_rater([(names[found.rater[row]], bool(found.left[row])) for row in rows])
    p = holm([_habit(found.where(rows[found.rater[rows] == names.index(name)])) for name in by_rater])
    return Sides(whole, by_rater, {name: float(q) for name, q in zip(by_rater, p, strict=True) if q < SIGNIFICANT})


def _habit(mine: Votes) -> float:
    """The p-value of a rater's votes under no habit, whatever models the rater likes."""
    later = mine.value > 0  # the later model was chosen
    stood = later == mine.left  # it stood on the left
    return fisher(
        int((later & stood).sum()),
        int((~later & stood).sum()),
        int((later & ~stood).sum()),
        int((~later & ~stood).sum()),
    )


def fisher(a: int, b: int, c: int, d: int) -> float:
    """Two-sided p-value of Fisher's exact test of the table [[a, b], [c, d]] (R. A. Fisher, 1922)."""
    row, column, total = a + b, a + c, a + b + c + d
    ways = {
        k: math.comb(row, k) * math.comb(total - row, column - k)
        for k in range(max(0, row + column - total), min(row, column) + 1)
    }
    return sum(count for count in ways.values() if count <= ways[a]) / math.comb(total, column)


def _by_rater(rows: Sequence[tuple[str, bool]]) -> tuple[Share, dict[str, Share]]:
    asked, hits = Counter(name for name, _ in rows), Counter(name for name, hit in rows if hit)
    return counted(hits.total(), asked.total()), {name: counted(hits[name], asked[name]) for name in sorted(asked)}


# --- many models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strength:
    """A model among several (R. Bradley and M. Terry, 1952), by votes; a tie counts one half for each."""

    side: str
    strength: float  # logarithm; the base's is 0
    interval: Interval | None  # 95 %, over prompts and raters; None for the base
    over_base: float  # the share of votes that it would get against the base


def strengths(
    first: np.ndarray, second: np.ndarray, found: Votes, names: Sequence[str], *, seed: int = 0, resamples: int = 1000
) -> list[Strength] | None:
    """Strengths of K models from N votes; `first` and `second` [N] are the models of a vote, the later one second.

    None where votes give a model none: some won or lost against all others, or were never compared with them.
    """
    count = len(names)
    by_prompt, wins = _wins(first, second, found, count)
    if not _connected(wins):
        return None
    theta = bradley_terry(wins[None])[0]
    rows = by_prompt.reshape(len(by_prompt), -1)
    drawn = bradley_terry(resampled(rows, keyed(seed, count), resamples).reshape(-1, count, count), ROUGHLY)
    errors = _rater_errors(theta, wins, first, second, found)
    random = keyed(seed, count + 1)
    result = []
    for k, name in enumerate(names):
        moved = drawn[:, k]
        if other := errors[k]:
            shift = other.error * random.standard_t(other.freedom, size=resamples)
            moved = np.concatenate([moved + shift, moved - shift])
        interval = percentiles(moved) if k else None
        result.append(Strength(name, float(theta[k]), interval, float(1 / (1 + np.exp(-theta[k])))))
    return result


def _wins(first: np.ndarray, second: np.ndarray, found: Votes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wins of each model (row) over each (column), by prompt [P, K, K] and in all [K, K]."""
    prompts, prompt = np.unique(found.prompt, return_inverse=True)
    by_prompt = np.zeros((len(prompts), count, count))
    np.add.at(by_prompt, (prompt, second, first), (1 + found.value) / 2)
    np.add.at(by_prompt, (prompt, first, second), (1 - found.value) / 2)
    return by_prompt, by_prompt.sum(0)


def _connected(wins: np.ndarray) -> bool:
    """Whether every model beat every other at least by way of others: only then are all strengths finite."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in wins:
        reach = reach @ reach
    return bool(reach.all())


def _rater_errors(
    theta: np.ndarray, wins: np.ndarray, first: np.ndarray, second: np.ndarray, found: Votes
) -> list[Besides | None]:
    """What who the raters are adds to the error of each log strength: from how much each vote moves it [N, K]."""
    better = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))  # of the row over the column
    information = -(wins + wins.T) * better * better.T
    information -= np.diag(information.sum(1))
    of_vote = np.zeros((len(found.value), len(theta)))
    surprise = (1 + found.value) / 2 - better[second, first]
    rows = np.arange(len(surprise))
    of_vote[rows, second] += surprise
    of_vote[rows, first] -= surprise
    moved = of_vote[:, 1:] @ np.linalg.inv(information[1:, 1:])  # the base's stays 0
    return [None, *(rater_error(column, found.rater) for column in moved.T)]

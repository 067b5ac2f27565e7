"""Confidence intervals of counted shares, and strengths from counted wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964  # standard deviations of a normal distribution on either side that hold 95 %
STEPS, CLOSE = 10_000, 1e-10  # of the iteration for strengths: at most so many, ended by a change so small


def share_interval(successes: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % unless `z` says otherwise (E. B. Wilson, 1927).

    Both may be fractional: a tie counts one half, and pairs of one prompt fewer than they are. With a count of 0 the interval is 0 to 1.
    """
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def independent(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """(successes, count) of values [n] in [0, 1] as of so many independent ones that their share has the same error.

    groups: [n] keys; values of one group go together. Where each is alone the count is n; where all are equal, which says
    nothing of how they go together, it is the number of groups.
    """
    total, count = float(values.sum()), float(len(values))
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) == count:
        return total, count
    share = total / count
    variance = float((np.bincount(group, values - share) ** 2).sum()) / count**2
    alone = share * (1 - share) / variance if variance > 0 else count
    effective = float(len(sizes)) if (values == values[0]).all() else min(max(alone, 1.0), count)
    return total * (effective / count), effective


def balanced_interval(counts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent shares, each (successes, count), from Wilson's of each.

    The distances of their ends from the shares are added as variances are (MOVER: Zou and Donner, 2008).
    With one share it is its own interval.
    """
    if len(counts) == 1:
        return share_interval(*counts[0])
    shares = [successes / count if count else 0.5 for successes, count in counts]
    ends = [share_interval(*one) for one in counts]
    down = math.hypot(*(share - low for share, (low, _) in zip(shares, ends, strict=True)))
    up = math.hypot(*(high - share for share, (_, high) in zip(shares, ends, strict=True)))
    mean = sum(shares) / len(shares)
    return max(0.0, mean - down / len(shares)), min(1.0, mean + up / len(shares))


def exact_interval(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share that covers at least `level` whatever the share is (Clopper and Pearson, 1934).

    With a count of 0 it is 0 to 1.
    """
    tail = (1 - level) / 2
    return 1.0 - _highest(count - successes, count, tail), _highest(successes, count, tail)


def _highest(successes: int, count: int, tail: float) -> float:
    """The largest share by which at most `successes` of `count` still have the probability `tail`."""
    low, high = (1.0, 1.0) if successes >= count else (successes / count, 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(successes, count, middle) > tail else (low, middle)
    return low


def at_most(few: int, count: int, p: float) -> float:
    """Probability of at most `few` of `count`, each with probability `p`, below 1 where few is below count."""
    if p <= 0 or few >= count:
        return 1.0
    i = np.arange(1, few + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(count - i + 1) - np.log(i))])
    k = np.arange(few + 1)
    return float(np.exp(logs + k * math.log(p) + (count - k) * math.log1p(-p)).sum())


def bradley_terry(wins: np.ndarray, close: float = CLOSE) -> np.ndarray:
    """Log strengths [R, K], the first player's 0, that make wins [R, K, K] likeliest (D. Hunter's iteration, 2004).

    wins: R sets of results, of each player (row) over each (column). A player without a win, as a resample may have one,
    would fall for ever; it gets a billionth of its games.
    """
    games = wins + wins.transpose(0, 2, 1)
    won = np.maximum(wins.sum(2), 1e-9 * games.sum(2)) + 1e-12
    gamma = np.ones(won.shape)
    for _ in range(STEPS):
        updated = won / ((games / (gamma[:, :, None] + gamma[:, None, :])).sum(2) + 1e-12)
        updated /= np.exp(np.log(updated).mean(1, keepdims=True))
        moved = np.abs(np.log(updated / gamma)).max()
        gamma = updated
        if moved < close:
            break
    theta: np.ndarray = np.log(gamma)
    return theta - theta[:, :1]

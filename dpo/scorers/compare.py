"""Two models' scores on the same prompts and seeds: by how much they differ, how often B wins, how sure that is.

Prompts are what is sampled; the images of one prompt are not independent. So every figure is averaged inside a prompt
first, and intervals and tests are over prompts. Everything random is keyed by `seed`; neither the order of the rows nor
which of the two models is called A matters: swapping them mirrors every figure to the last bit.

Intervals of a mean are studentised bootstraps over prompts (bootstrap-t: B. Efron, 1979), because percentiles cover too
little on 20 prompts and on skewed scores. A win rate near 0 or 1 cannot be resampled (all wins stay all wins), so its
interval is Wilson's with the effective number of comparisons, which the spread between prompts gives. Two to five
training seeds are too few to resample as well: their share of the error is Student's t, added draw by draw. Simulated
coverage is in 92 to 98 %, but for win rates above 0.95 that two or three prompts of fifty decide (88 %), and for two
training seeds that differ much less than prompts do (90 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo.common.errors import UserError
from dpo.common.stats import Z95, at_most

Interval = tuple[float, float]

LEVEL, POWER = 0.95, 0.80
ONE_IN = 20  # chance tests that are significant: the 1 - LEVEL of whole numbers
FEWEST = 5  # prompts below which a mean has no interval: resamples of four hold hardly any different ones
AT_ONCE = 1 << 22  # numbers gathered at a time
GRID = 2.0**48  # shares lie on this grid, where a share and its complement add to exactly 1


@dataclass(frozen=True)
class Paired:
    """B against A on the same images' prompts and seeds. Higher `win_rate` is better for B; `difference` is B - A."""

    prompts: int
    images: int  # compared pairs of images, each training seed's counted
    training_seeds: int
    mean_a: float  # over prompts, of the mean inside a prompt
    mean_b: float
    median_a: float  # over images
    median_b: float
    difference: float  # mean over prompts
    difference_interval: Interval | None  # 95 %; None below five prompts
    win_rate: float  # B's, a tie counts one half
    win_interval: Interval  # 95 %
    ties: float  # share of the pairs of images, averaged as the win rate is
    p_sign: float  # two-sided sign test over prompts, those without a difference dropped
    detectable: float | None  # smallest true win rate shown with power 80 % by so many prompts; None below six


class Worth(NamedTuple):
    """How many of the base's images one picks the best of, to be as good as one image of B on average."""

    n: float  # between 1 and `limit`
    interval: Interval  # 95 %, between 1 and `limit`
    limit: int  # images a prompt: at this bound the number is "at least"; at 1 it is "no more than a single image"


class Besides(NamedTuple):
    """An error of a mean that does not come from its prompts, but from few of something else: training seeds, raters."""

    error: float  # standard error
    freedom: int  # degrees of freedom that it was estimated with


def paired(
    prompt: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    resolution: float = 0.0,
    higher_is_better: bool = True,
    training: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 4000,
) -> Paired:
    """Compare scores `a` and `b` [N] of pairs of images, drawn with one seed for one prompt (`prompt`, int [N]).

    Scores that differ by at most `resolution` tie. `training` [N] numbers the training seed of B's image; every training
    seed must have every prompt, and the intervals then hold for a new training seed as well as for new prompts.
    Raises UserError where nothing can be compared: no rows, scores that are not finite, prompts that a seed lacks.
    """
    prompt, a, b = _rows(prompt, a, b)
    training = np.zeros(len(prompt), int) if training is None else np.asarray(training)
    cells = _Cells(prompt, training)
    gap = b - a
    sign = np.where(np.abs(gap) <= resolution, 0.0, np.sign(gap))
    advantage = cells.mean(sign if higher_is_better else -sign)  # [T, P], -1..1
    differences = cells.mean(gap)
    by_prompt = _means(differences)
    plus, minus = int((by_prompt > resolution).sum()), int((by_prompt < -resolution).sum())
    return Paired(
        prompts=cells.prompts,
        images=len(prompt),
        training_seeds=cells.seeds,
        mean_a=_mean(cells.mean(a)),
        mean_b=_mean(cells.mean(b)),
        median_a=float(np.median(a)),
        median_b=float(np.median(b)),
        difference=_mean(differences),
        difference_interval=mean_interval(differences, seed=seed, resamples=resamples),
        win_rate=share(_mean(advantage)),
        win_interval=advantage_interval(advantage, len(prompt), seed=seed, resamples=resamples),
        ties=_mean(cells.mean((sign == 0).astype(float))),
        p_sign=sign_test(plus, minus),
        detectable=detectable(cells.prompts),
    )


def by_category(
    category: Sequence[str],
    prompt: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    resolution: float = 0.0,
    higher_is_better: bool = True,
    training: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 4000,
) -> dict[str, Paired]:
    """`paired` of the rows of each category [N], by name in alphabetical order."""
    names = np.asarray(category, dtype=object)
    if len(names) != len(prompt):
        raise ValueError(f"{len(names)} categories for {len(prompt)} rows")
    return {
        name: paired(
            np.asarray(prompt)[rows],
            np.asarray(a)[rows],
            np.asarray(b)[rows],
            resolution=resolution,
            higher_is_better=higher_is_better,
            training=None if training is None else np.asarray(training)[rows],
            seed=seed,
            resamples=resamples,
        )
        for name in sorted(set(category))
        for rows in [names == name]
    }


def sign_test(plus: int, minus: int) -> float:
    """Two-sided exact p-value of `plus` and `minus` signs under a fair coin; 1 without any."""
    count, few = plus + minus, min(plus, minus)
    ways = total = 1
    for i in range(few):
        ways = ways * (count - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**count)  # whole numbers of any size: Python divides them exactly rounded


def detectable(prompts: int) -> float | None:
    """The smallest share of prompts on one side that a sign test at 5 % shows in 80 % of samples of `prompts`.

    None where no sample is significant: below six prompts.
    """
    few, ways, total = -1, 1, 1  # the most prompts on the other side that are significant
    while 2 * ONE_IN * total <= 2**prompts:
        few += 1
        ways = ways * (prompts - few) // (few + 1)
        total += ways
    if few < 0:
        return None
    low, high = 0.5, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if at_most(few, prompts, 1 - middle) >= POWER else (middle, high)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of several, in the order given (S. Holm, 1979)."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def worth(
    prompt: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = 4000,
) -> Worth | None:
    """The n at which the best of n images of A scores what B scores on average; a normal shifted by 0.564 sd is worth 2.

    `prompt` int [N], `a` and `b` [N] as for `paired`. The expected best of n is the mean over all choices of n of the
    images that a prompt has, which has no bias; between whole n it runs straight in log n. Nothing is extrapolated: n
    ends at the images of the prompt that has fewest. None where that is one, or where every prompt's images score alike.
    Raises UserError as `paired` does.
    """
    prompt, a, b = _rows(prompt, a, b)
    if not higher_is_better:
        a, b = -a, -b
    _, where = np.unique(prompt, return_inverse=True)
    rows = [np.flatnonzero(where == i) for i in range(where.max() + 1)]
    limit = min(len(of) for of in rows)
    columns = np.array(
        [[*_best_of(np.sort(a[of]), limit), math.fsum(b[of]) / len(of)] for of in rows]
    )  # [P, limit + 1]
    if limit == 1 or (columns[:, 0] == columns[:, limit - 1]).all():
        return None
    n = _crossing(columns.mean(0, keepdims=True))[0]
    drawn = _crossing(resampled(columns, keyed(seed, len(rows)), resamples))
    return Worth(float(n), percentiles(drawn), limit)


# --- means inside prompts, then over them ------------------------------------------------------------------------------


def _rows(prompt: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prompt, a, b = np.asarray(prompt), np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not prompt.shape == a.shape == b.shape or prompt.ndim != 1:
        raise ValueError(f"prompt, a and b must be [N]: {prompt.shape}, {a.shape}, {b.shape}")
    if len(prompt) == 0:
        raise UserError("there is nothing to compare: no prompt and seed has an image of both models")
    if bad := int((~(np.isfinite(a) & np.isfinite(b))).sum()):
        raise UserError(f"{bad} of {len(a)} scores are no finite numbers: leave these images out, or score them again")
    return prompt, a, b


class _Cells:
    """Rows gathered by training seed and prompt."""

    def __init__(self, prompt: np.ndarray, training: np.ndarray):
        prompts, column = np.unique(prompt, return_inverse=True)
        seeds, row = np.unique(training, return_inverse=True)
        self.seeds, self.prompts = len(seeds), len(prompts)
        cell = row * self.prompts + column
        counts = np.bincount(cell, minlength=self.seeds * self.prompts)
        if (counts == 0).any():
            t, p = divmod(int(np.argmin(counts)), self.prompts)
            raise UserError(
                f"training seed {seeds[t]} has no image for prompt {prompts[p]}: draw the same prompts for all of them"
            )
        self.order = np.argsort(cell, kind="stable")
        self.bounds = np.cumsum(counts)[:-1]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """[N] -> [T, P]. Sums are rounded once, so that the order of the rows does not matter."""
        parts = np.split(values[self.order], self.bounds)
        return np.array([math.fsum(part) / len(part) for part in parts]).reshape(self.seeds, self.prompts)


def _means(values_TP: np.ndarray) -> np.ndarray:
    """[T, P] -> [P], over training seeds."""
    return np.array([math.fsum(column) / len(column) for column in values_TP.T])


def _mean(values_TP: np.ndarray) -> float:
    return math.fsum(values_TP.ravel()) / values_TP.size


def share(advantage: float) -> float:
    """The win rate 0..1 of an advantage -1..1 (wins less losses)."""
    return 0.5 + round(max(-1.0, min(1.0, advantage)) * GRID) / (2 * GRID)


# --- intervals ---------------------------------------------------------------------------------------------------------


def keyed(seed: int, stream: int) -> np.random.Generator:
    """A generator of its own for each seed and stream."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, stream]))


def percentiles(drawn: np.ndarray) -> Interval:
    """The 95 % interval of resampled figures [R]. Whole order statistics, so that mirrored figures mirror."""
    ordered, outside = np.sort(drawn), int((1 - LEVEL) / 2 * len(drawn))
    return float(ordered[outside]), float(ordered[-1 - outside])


def resampled(values_PC: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of the columns over P rows drawn with replacement: [resamples, C]."""
    rows, columns = values_PC.shape
    step = max(1, AT_ONCE // (rows * columns))
    parts = [
        values_PC[generator.integers(0, rows, size=(min(step, resamples - start), rows))].mean(1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _seed_error(values_TP: np.ndarray) -> Besides | None:
    """The error that the training seeds give the mean; None where there is none, or only one seed.

    Half of what the finite number of prompts explains of their spread is taken off: the prompts' own error has it
    already. With none taken off intervals of seeds that are alike cover 99 %, with all of it those of two seeds 87 %.
    """
    seeds, prompts = values_TP.shape
    if seeds == 1 or prompts == 1:
        return None
    by_seed, by_prompt = values_TP.mean(1), values_TP.mean(0)
    rest = values_TP - by_seed[:, None] - by_prompt + values_TP.mean()
    noise = (rest**2).sum() / ((seeds - 1) * (prompts - 1))
    error = math.sqrt(max(0.0, by_seed.var(ddof=1) - noise / (2 * prompts)) / seeds)
    return Besides(error, seeds - 1) if error else None


def mean_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = 4000, besides: Besides | None = None
) -> Interval | None:
    """95 % interval of the mean of [P] over prompts, or of [T, P] over prompts and training seeds; None below five.

    besides: another error than the prompts' and that of training seeds.
    """
    values_TP = np.atleast_2d(values)
    prompts = values_TP.shape[1]
    if prompts < FEWEST:
        return None
    mean = _mean(values_TP)
    centred = _means(values_TP) - mean
    spread = math.sqrt((centred**2).mean())
    generator = keyed(seed, prompts)
    moved, square = resampled(np.stack([centred, centred**2], 1), generator, resamples).T
    spreads = np.sqrt(np.maximum(square - moved**2, 0.0))
    # Where few prompts differ a resample may have no spread of its own; it is measured by the sample's.
    drawn = -moved / np.where(spreads > 1e-6 * spread, spreads, spread or 1.0) * spread
    if other := besides or _seed_error(values_TP):
        shift = other.error * generator.standard_t(other.freedom, size=resamples)
        drawn = np.concatenate([drawn + shift, drawn - shift])  # both signs: exact mirrors
    return percentiles(mean + drawn)


def advantage_interval(
    values: np.ndarray, comparisons: int, *, seed: int = 0, resamples: int = 4000, besides: Besides | None = None
) -> Interval:
    """95 % interval of the win rate, from the advantages (wins less losses) -1..1 of [P] prompts or [T, P].

    comparisons: single ones in all. besides: as for `mean_interval`.
    """
    values_TP = np.atleast_2d(values)
    prompts = values_TP.shape[1]
    mean = _mean(values_TP)
    # The spread between prompts, with one prompt more that is as far from the others as can be: where nearly all prompts
    # agree, the sample's own spread says little.
    of_prompts = (((_means(values_TP) - mean) ** 2).sum() + (1 - mean**2)) / prompts**2
    other = besides or _seed_error(values_TP)
    of_others = other.error**2 if other else 0.0
    count, z = float(prompts), Z95
    if variance := of_prompts + of_others:
        # As many single comparisons as have this variance: no image is more than one, nor a prompt less.
        count = min(max((1 - mean**2) / variance, 0.0 if other else count), float(comparisons))
    if other:
        generator = keyed(seed, prompts)
        normal, student = generator.standard_normal(resamples), generator.standard_t(other.freedom, size=resamples)
        drawn = np.sort(np.abs(normal * math.sqrt(of_prompts) + student * math.sqrt(of_others)))
        z = float(drawn[-1 - int((1 - LEVEL) * resamples)]) / math.sqrt(variance)
    # Wilson's interval, written for wins less losses, where it is symmetric about 0.
    scale = 1 + z * z / count
    half = z / scale * math.sqrt((1 - mean**2) / count + z * z / count**2)
    return share(mean / scale - half), share(mean / scale + half)


# --- best of n ---------------------------------------------------------------------------------------------------------


def _best_of(ascending: np.ndarray, limit: int) -> list[float]:
    """Expected best of 1..limit of these scores, drawn without replacement: the i-th is best in C(i, n - 1) choices."""
    count = len(ascending)
    return [
        math.fsum(math.comb(i, n - 1) / math.comb(count, n) * float(ascending[i]) for i in range(n - 1, count))
        for n in range(1, limit + 1)
    ]


def _crossing(columns: np.ndarray) -> np.ndarray:
    """[R, limit + 1], the best of 1..limit and B's mean, to n [R] in 1..limit."""
    curve, target = columns[:, :-1], columns[:, -1]
    limit = curve.shape[1]
    passed = (curve <= target[:, None]).sum(1)  # the curve never falls
    low = np.clip(passed - 1, 0, limit - 2)
    at = np.take_along_axis(curve, np.stack([low, low + 1], 1), 1)
    rise = at[:, 1] - at[:, 0]
    part = np.clip((target - at[:, 0]) / np.where(rise > 0, rise, 1.0), 0.0, 1.0)
    n = np.exp((1 - part) * np.log(low + 1) + part * np.log(low + 2))
    return np.where(passed == 0, 1.0, np.where(passed == limit, float(limit), n))

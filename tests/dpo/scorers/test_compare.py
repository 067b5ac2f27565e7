"""Figures against scipy and brute force, coverage by simulation, mirrors and keys to the last bit."""

from dataclasses import asdict
from itertools import chain, combinations

import numpy as np
import pytest
from scipy import stats

from dpo.common.errors import UserError
from dpo.common.stats import share_interval
from dpo.scorers import compare
from dpo.scorers.compare import (
    Besides,
    advantage_interval,
    by_category,
    detectable,
    holm,
    mean_interval,
    paired,
    sign_test,
    worth,
)


def table(seed=0, prompts=30, images=3, decimals=1):
    """Random scores with exact ties and prompts of unequal numbers of images, in no order."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts) * 7 + 3, rng.integers(1, images + 1, prompts))
    rng.shuffle(prompt)
    a = rng.normal(20, 1, len(prompt)).round(decimals)
    return prompt, a, (a + rng.normal(0.3, 1, len(prompt))).round(decimals)


# --- figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("higher", [True, False])
def test_figures_are_those_of_scipy_and_of_counting(seed, higher):
    prompt, a, b = table(seed)
    found = paired(prompt, a, b, resolution=0.05, higher_is_better=higher)
    groups = [prompt == i for i in np.unique(prompt)]
    gap, sign = b - a, np.where(abs(b - a) <= 0.05, 0, np.sign(b - a)) * (1 if higher else -1)
    assert (found.prompts, found.images, found.training_seeds) == (len(groups), len(prompt), 1)
    assert found.mean_a == pytest.approx(np.mean([a[g].mean() for g in groups]), abs=1e-12)
    assert found.mean_b == pytest.approx(np.mean([b[g].mean() for g in groups]), abs=1e-12)
    assert (found.median_a, found.median_b) == (np.median(a), np.median(b))
    assert found.difference == pytest.approx(np.mean([gap[g].mean() for g in groups]), abs=1e-12)
    wins = np.mean([((sign[g] > 0) + 0.5 * (sign[g] == 0)).mean() for g in groups])
    assert found.win_rate == pytest.approx(wins, abs=1e-9)
    assert found.ties == pytest.approx(np.mean([(sign[g] == 0).mean() for g in groups]), abs=1e-12)
    mean_gap = np.array([gap[g].mean() for g in groups])
    plus, minus = int((mean_gap > 0.05).sum()), int((mean_gap < -0.05).sum())
    assert found.p_sign == pytest.approx(stats.binomtest(plus, plus + minus).pvalue, rel=1e-9)


@pytest.mark.parametrize("plus, minus", [(0, 0), (1, 0), (3, 3), (9, 1), (70, 41), (1700, 1500), (2, 3000)])
def test_sign_test_is_scipys(plus, minus):
    expected = stats.binomtest(plus, plus + minus).pvalue if plus + minus else 1.0
    assert sign_test(plus, minus) == pytest.approx(expected, rel=1e-9)
    assert sign_test(minus, plus) == sign_test(plus, minus)


@pytest.mark.parametrize("prompts", [6, 7, 20, 50, 487, pytest.param(3200, marks=pytest.mark.slow)])
def test_detectable_is_where_the_test_has_four_fifths_power(prompts):
    wins = np.arange(prompts + 1)
    rejected = np.array([stats.binomtest(int(k), prompts).pvalue <= 0.05 for k in wins]) & (wins > prompts / 2)
    found = detectable(prompts)
    assert stats.binom.pmf(wins, prompts, found)[rejected].sum() == pytest.approx(0.8, abs=1e-6)


def test_fewer_than_six_prompts_can_show_nothing():
    assert [detectable(n) for n in range(6)] == [None] * 6


def test_holm_is_the_closure_of_bonferroni():
    """An adjusted p-value is the largest that any set of hypotheses with this one in it has by Bonferroni."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = [*rng.random(4) ** 4, 0.02, 0.02]
        sets = list(chain.from_iterable(combinations(range(6), n) for n in range(1, 7)))
        closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(6)]
        assert holm(p) == pytest.approx(closed, rel=1e-12)
    assert holm([]) == []


def test_a_win_rate_of_single_images_has_wilsons_interval():
    prompt = np.arange(40)
    found = paired(prompt, np.zeros(40), np.where(prompt < 30, 1.0, -1.0))
    assert found.win_interval == pytest.approx(share_interval(30, 40), abs=1e-6)
    all_won = paired(prompt, np.zeros(40), np.ones(40))
    assert (all_won.win_rate, all_won.win_interval[1]) == (1.0, 1.0)
    assert all_won.win_interval[0] == pytest.approx(share_interval(40, 40)[0], abs=1e-6)


def test_images_of_prompts_that_nearly_all_agree_are_not_taken_for_independent():
    prompt = np.repeat(np.arange(20), 8)
    b = np.ones(160)
    b[0] = -1.0
    low, _ = paired(prompt, np.zeros(160), b).win_interval
    assert share_interval(20 * 159 / 160, 20)[0] < low < share_interval(125 * 159 / 160, 125)[0]


def test_the_interval_of_a_difference_is_the_studentised_bootstrap_of_scipys_parts():
    """The same pivots from an independent loop: no shared resampling, so to the noise of 20,000 resamples."""
    rng = np.random.default_rng(3)
    x = rng.exponential(1, 40)
    found = paired(np.arange(40), np.zeros(40), x, resamples=20000)
    again = rng.choice(x, (20000, 40))
    pivots = (again.mean(1) - x.mean()) / stats.sem(again, axis=1)
    expected = x.mean() - np.quantile(pivots, [0.975, 0.025]) * stats.sem(x)
    assert found.difference_interval == pytest.approx(expected, abs=0.03)


@pytest.mark.long
@pytest.mark.parametrize("interval", [mean_interval, lambda values, **more: advantage_interval(values, 400, **more)])
def test_an_error_besides_the_prompts_is_added_as_students_t(interval):
    """A large one leaves its own interval, a small one that of the prompts; both mirror."""
    values = np.random.default_rng(0).uniform(-1, 1, 400)
    width = {
        error: float(np.diff(interval(values, besides=Besides(error, 4), resamples=20_000))[0]) for error in (1e-9, 0.1)
    }
    plain = float(np.diff(interval(values, resamples=20_000))[0])
    scale = 1 if interval is mean_interval else 0.5  # of an advantage, and of the share that it is
    assert width[1e-9] == pytest.approx(plain, rel=0.03)
    assert width[0.1] == pytest.approx(2 * stats.t.ppf(0.975, 4) * 0.1 * scale, rel=0.12)
    one, other = (interval(sign * values, besides=Besides(0.05, 2)) for sign in (1, -1))
    assert one == tuple(end if interval is mean_interval else 1 + end for end in (-other[1], -other[0]))


# --- mirrors and keys ---------------------------------------------------------------------------------------------------


def test_a_model_against_itself_is_one_half_exactly():
    prompt, a, _ = table()
    found = paired(prompt, a, a)
    assert (found.win_rate, found.difference, found.difference_interval) == (0.5, 0.0, (0.0, 0.0))
    assert (found.ties, found.p_sign) == (1.0, 1.0)
    assert found.win_interval[0] == 1 - found.win_interval[1] < 0.5


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_swapping_the_models_mirrors_every_figure_exactly(seed, seeds):
    prompt, a, b = table(seed, prompts=25, decimals=2)
    training = np.tile(np.arange(seeds), len(prompt)) if seeds > 1 else None
    if seeds > 1:
        rng = np.random.default_rng(seed)
        prompt, a, b = (np.repeat(x, seeds) for x in (prompt, a, b))
        b = b + rng.normal(0, 0.5, seeds)[training] + rng.normal(0, 0.1, len(b))
    options = {"resolution": 0.02, "training": training, "resamples": 500}
    one, other = paired(prompt, a, b, **options), paired(prompt, b, a, **options)
    mirrored = asdict(one) | {
        "mean_a": one.mean_b, "mean_b": one.mean_a, "median_a": one.median_b, "median_b": one.median_a,
        "difference": -one.difference,
        "difference_interval": (-one.difference_interval[1], -one.difference_interval[0]),
        "win_rate": 1 - one.win_rate,
        "win_interval": (1 - one.win_interval[1], 1 - one.win_interval[0]),
    }  # fmt: skip
    assert asdict(other) == mirrored


def test_the_order_of_rows_and_earlier_draws_do_not_matter():
    prompt, a, b = table(images=12)
    rng = np.random.default_rng(1)
    a, b = (x * rng.lognormal(0, 4, len(prompt)) for x in (a, b))  # sums that round differently in another order
    expected = paired(prompt, a, b, resamples=200)
    for _ in range(3):
        rows = rng.permutation(len(prompt))
        np.random.seed(None)
        assert paired(prompt[rows], a[rows], b[rows], resamples=200) == expected
    assert paired(prompt, a, b, resamples=200, seed=1).difference_interval != expected.difference_interval


def test_bootstraps_are_the_same_in_parts(monkeypatch):
    prompt, a, b = table(decimals=6)
    whole = paired(prompt, a, b, resamples=100), worth(prompt % 5, a, b, resamples=100)
    monkeypatch.setattr(compare, "AT_ONCE", 64)
    assert (paired(prompt, a, b, resamples=100), worth(prompt % 5, a, b, resamples=100)) == whole


def test_each_category_is_its_own_table():
    prompt, a, b = table()
    names = np.where(prompt % 2, "paintings", "anime")
    found = by_category(list(names), prompt, a, b, resolution=0.1, resamples=100)
    assert list(found) == ["anime", "paintings"]
    rows = names == "anime"
    assert found["anime"] == paired(prompt[rows], a[rows], b[rows], resolution=0.1, resamples=100)


def test_few_prompts_have_no_interval_of_the_difference():
    prompt = np.array([1, 1, 2, 3, 4])
    found = paired(prompt, np.zeros(5), np.arange(5.0))
    assert (found.prompts, found.difference_interval, found.detectable) == (4, None, None)
    assert paired(np.array([1]), np.zeros(1), np.ones(1)).win_interval == pytest.approx(share_interval(1, 1), abs=1e-6)


def test_prompts_that_mostly_tie_have_a_finite_interval():
    b = np.zeros(20)
    b[:2] = 1.0
    low, high = paired(np.arange(20), np.zeros(20), b).difference_interval
    assert low < 0.1 < high < 1.0


def test_what_cannot_be_compared_is_one_line():
    ones = np.ones(4)
    with pytest.raises(UserError, match=r"^there is nothing to compare"):
        paired(np.array([], int), np.array([]), np.array([]))
    with pytest.raises(UserError, match=r"^1 of 4 scores are no finite numbers"):
        paired(np.arange(4), ones, np.array([1, np.nan, 1, 1]))
    with pytest.raises(UserError, match=r"^training seed 1 has no image for prompt 8: draw the same prompts"):
        paired(np.array([5, 8, 5]), ones[:3], ones[:3], training=np.array([0, 0, 1]))
    with pytest.raises(ValueError):
        paired(np.arange(3), ones, ones)
    with pytest.raises(ValueError):
        by_category(["x"], np.arange(4), ones, ones)


# --- coverage -----------------------------------------------------------------------------------------------------------

EFFECTS = {  # of a prompt: its distribution and the mean
    "normal": (lambda rng, n: rng.normal(0.2, 1, n), 0.2),
    "skewed up": (lambda rng, n: rng.exponential(1, n), 1.0),
    "skewed down": (lambda rng, n: -rng.exponential(1, n), -1.0),
}
TABLES = 400


def covered(draw, truth, interval, rng, resamples):
    hits = 0
    for _ in range(TABLES):
        low, high = interval(paired(*draw(rng), resamples=resamples))
        hits += low <= truth <= high
    return hits / TABLES


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [20, 50, 200])
@pytest.mark.parametrize("effect", EFFECTS)
def test_intervals_of_the_difference_cover(prompts, effect):
    of, truth = EFFECTS[effect]

    def draw(rng):
        prompt = np.repeat(np.arange(prompts), 2)
        return prompt, np.zeros(2 * prompts), of(rng, prompts)[prompt] + rng.normal(0, 0.5, 2 * prompts)

    assert (
        0.92 <= covered(draw, truth, lambda p: p.difference_interval, np.random.default_rng(prompts + 1), 600) <= 0.98
    )


@pytest.mark.long
@pytest.mark.parametrize("prompts", [20, *(pytest.param(many, marks=pytest.mark.slow) for many in (50, 200))])
@pytest.mark.parametrize("rate", [0.5, 0.05, 0.95])
@pytest.mark.parametrize("images", [1, 4])
def test_intervals_of_the_win_rate_cover(prompts, rate, images):
    """Of one image a prompt, and of four whose chances differ from prompt to prompt (beta, concentration 2)."""

    def draw(rng):
        chance = rng.beta(2 * rate, 2 - 2 * rate, prompts) if images > 1 else np.full(prompts, rate)
        prompt = np.repeat(np.arange(prompts), images)
        return prompt, np.zeros(len(prompt)), np.where(rng.random(len(prompt)) < chance[prompt], 1.0, -1.0)

    assert 0.92 <= covered(draw, rate, lambda p: p.win_interval, np.random.default_rng(prompts + 5), 40) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_new_training_seeds(seeds):
    """Of a difference and of a win rate, where both prompts and training seeds are drawn."""
    rng, prompts, hits = np.random.default_rng(seeds), 40, np.zeros(2)
    prompt, training = np.tile(np.arange(prompts), seeds), np.repeat(np.arange(seeds), prompts)
    truth = np.array([0.5, stats.norm.cdf(0.5 / np.sqrt(0.3**2 + 1 + 0.5**2))])
    for _ in range(TABLES):
        effect = rng.normal(0.5, 1, prompts)[prompt] + rng.normal(0, 0.3, seeds)[training]
        found = paired(
            prompt, np.zeros(len(prompt)), effect + rng.normal(0, 0.5, len(prompt)), training=training, resamples=500
        )
        intervals = np.array([found.difference_interval, found.win_interval])
        hits += (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    assert ((hits / TABLES >= 0.92) & (hits / TABLES <= 0.985)).all(), hits / TABLES


def test_without_training_seeds_an_interval_holds_for_these_models_only():
    rng = np.random.default_rng(0)
    prompt, training = np.tile(np.arange(40), 3), np.repeat(np.arange(3), 40)
    b = rng.normal(0, 0.5, 40)[prompt] + np.array([-1.0, 0.0, 1.0])[training]
    with_seeds = paired(prompt, np.zeros(120), b, training=training).difference_interval
    without = paired(prompt, np.zeros(120), b).difference_interval
    assert with_seeds[1] - with_seeds[0] > 5 * (without[1] - without[0])


# --- worth --------------------------------------------------------------------------------------------------------------


def seeds_of(rng, prompts, images, shift):
    prompt = np.repeat(np.arange(prompts), images)
    centre = rng.normal(0, 2, prompts)[prompt]
    return prompt, centre + rng.normal(0, 1, len(prompt)), centre + shift + rng.normal(0, 1, len(prompt))


@pytest.mark.long
def test_a_normal_shifted_by_the_best_of_two_is_worth_two():
    """The expected larger of two standard normals is 1/sqrt(pi) = 0.564, of three 0.846."""
    rng = np.random.default_rng(0)
    assert worth(*seeds_of(rng, 8000, 8, 0.5642), resamples=40).n == pytest.approx(2.0, abs=0.05)
    assert worth(*seeds_of(rng, 8000, 8, 0.8463), resamples=40).n == pytest.approx(3.0, abs=0.1)
    prompt, a, b = seeds_of(rng, 8000, 8, -0.5642)
    assert worth(prompt, a, b, higher_is_better=False, resamples=40).n == pytest.approx(2.0, abs=0.05)


def test_the_best_of_n_is_the_mean_over_all_choices():
    scores = np.random.default_rng(0).normal(size=7)
    expected = [np.mean([max(c) for c in combinations(scores, n)]) for n in range(1, 6)]
    assert compare._best_of(np.sort(scores), 5) == pytest.approx(expected, abs=1e-12)


def test_worth_ends_at_the_images_drawn():
    prompt = np.repeat(np.arange(10), 4)
    a = np.tile([0.0, 1.0, 2.0, 3.0], 10)
    assert worth(prompt, a, a + 9) == (4.0, (4.0, 4.0), 4)
    assert worth(prompt, a, a - 9) == (1.0, (1.0, 1.0), 4)
    assert worth(prompt, a, a).n == pytest.approx(1.0, abs=1e-9)
    fewer = np.arange(40) != 0
    assert worth(prompt[fewer], a[fewer], a[fewer] + 9).limit == 3
    assert worth(np.arange(40), a, a + 1) is None
    assert worth(prompt, np.ones(40), a) is None


@pytest.mark.long
def test_intervals_of_worth_cover():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(TABLES):
        low, high = worth(*seeds_of(rng, 60, 8, 0.5642), resamples=300).interval
        hits += low <= 2.0 <= high
    assert 0.92 <= hits / TABLES <= 0.98

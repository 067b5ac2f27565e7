"""dpo.common.stats: intervals against textbook values, scipy, and their own definitions."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from dpo.common.stats import at_most, balanced_interval, bradley_terry, exact_interval, independent, share_interval


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"), [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_share_interval_is_wilsons(successes, count, low, high):
    assert share_interval(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_share_interval_of_nothing_says_nothing():
    assert share_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("z", [1.0, 1.96, 2.575829])
def test_the_ends_are_z_deviations_from_the_share(z):
    """Wilson's definition: an end p is where |share - p| = z sqrt(p (1 - p) / n)."""
    for end in share_interval(37.5, 120, z):
        assert abs(37.5 / 120 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 120))


@pytest.mark.parametrize(("p", "n"), [((0.7, 0.5), (60, 20)), ((0.9, 0.3), (100, 12)), ((0.5, 0.5), (30, 30))])
def test_the_balanced_interval_holds_the_mean_of_two_shares_as_often_as_it_says(p, n):
    """Its coverage, summed over all outcomes of both binomials."""
    covered = 0.0
    for hits in np.ndindex(n[0] + 1, n[1] + 1):
        low, high = balanced_interval(list(zip(hits, n, strict=True)))
        covered += (low <= sum(p) / 2 <= high) * math.prod(binom.pmf(k, m, q) for k, m, q in zip(hits, n, p))
    assert 0.935 < covered < 0.985


def test_the_balanced_interval_of_one_share_is_wilsons_and_of_equal_ones_that_of_their_sum():
    assert balanced_interval([(7, 20)]) == share_interval(7, 20)
    assert balanced_interval([(300, 500), (300, 500)]) == pytest.approx(share_interval(600, 1000), abs=1e-3)


def test_the_embedded_worlds_printed_figures_do_not_depend_on_the_digits_of_z():
    """Its record says 0.887 (0.829 to 0.928) of 160 prompts, once computed with z = 1.96."""
    for z in (1.96, 1.959964):
        assert [f"{end:.3f}" for end in share_interval(142, 160, z)] == ["0.829", "0.928"]


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (3, 7), (1, 400), (230, 400), (4000, 9000)])
def test_the_exact_interval_is_clopper_and_pearsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="exact")
    assert exact_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_exact_interval_by_hand():
    """Of 10 hits in 10 the lower end is the tenth root of 0.025; of nothing nothing is known."""
    assert exact_interval(10, 10) == pytest.approx((0.025**0.1, 1.0))
    assert exact_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("few", "count", "p"), [(0, 5, 0.2), (5, 5, 0.9), (3, 40, 0.1), (500, 1000, 0.5), (2, 9, 0.0)])
def test_at_most_is_the_binomial_distribution(few, count, p):
    assert at_most(few, count, p) == pytest.approx(binom.cdf(few, count, p))


def test_strengths_of_two_players_are_their_log_odds_and_make_the_wins_likeliest():
    wins = np.array([[[0, 3.0], [1, 0]], [[0, 1.0], [1, 0]]])
    np.testing.assert_allclose(bradley_terry(wins), [[0, -math.log(3)], [0, 0]], atol=1e-8)
    wins = np.random.default_rng(0).integers(1, 9, (1, 5, 5)).astype(float)
    wins[0, range(5), range(5)] = 0
    (theta,) = bradley_terry(wins)
    won = (wins[0] + wins[0].T) / (1 + np.exp(theta[None, :] - theta[:, None]))
    np.testing.assert_allclose(won.sum(1), wins[0].sum(1), rtol=1e-6)
    assert theta[0] == 0


def test_what_goes_together_counts_as_fewer():
    """Eight alike of each group count as one; each alone is counted as it is, to the last bit."""
    values = np.repeat(np.arange(60) < 48, 8).astype(float)
    successes, count = independent(values, np.repeat(np.arange(60), 8))
    assert (successes, count) == pytest.approx((48, 60))
    assert independent(values[::7], np.arange(len(values[::7]))) == (values[::7].sum(), len(values[::7]))
    assert independent(np.full(6, 0.5), np.zeros(6)) == (0.5, 1), "no spread: nothing says how they go together"
    assert independent(np.ones(6), np.arange(6) // 3) == (2, 2), "as few as there are groups"
    assert independent(np.array([1.0, 0, 1, 0]), np.arange(4) // 2) == (2, 4), "groups whose sums do not differ"
    assert independent(np.zeros(0), np.zeros(0)) == (0, 0)

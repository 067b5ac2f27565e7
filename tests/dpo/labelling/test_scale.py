"""From scores to labels: standardised votes, ties, probabilities, a temperature that is fitted and judged on other prompts."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from dpo.common.errors import UserError
from dpo.labelling import scale

NAN = math.nan


def simulated(n=4000, slope=2.5, prompts=400, seed=0):
    """Differences, labels drawn by Bradley-Terry with that slope, and the keys of the captions."""
    dice = np.random.default_rng(seed)
    apart = dice.normal(size=n)
    said = (dice.random(n) < 1 / (1 + np.exp(-slope * apart))).astype(float)
    return apart, said, dice.integers(0, prompts, n)


def test_one_scorer_stays_on_its_own_scale_and_lower_may_be_better():
    scores = [np.array([20.0, 21.5, NAN])]
    (one,) = scale.voters(["a"], [3.0], [1.0], scores)
    assert scale.combined([one], scores).tolist()[:2] == [20.0, 21.5]
    (other,) = scale.voters(["a"], [3.0], [-1.0], scores)
    assert scale.combined([other], scores).tolist()[:2] == [-20.0, -21.5]


def test_a_vote_is_the_weighted_mean_of_standardised_scores():
    a, b = np.array([1.0, 2.0, 3.0, NAN]), np.array([100.0, 500.0, 300.0, 200.0])
    chosen = scale.voters(["a", "b"], [3.0, 1.0], [1.0, -1.0], [a, b])
    found = scale.combined(chosen, [a, b])
    expected = 0.75 * (a - 2) / a[:3].std() - 0.25 * (b - b.mean()) / b.std()
    np.testing.assert_allclose(found, expected)
    wider = scale.combined(scale.voters(["a", "b"], [3.0, 1.0], [1.0, -1.0], [a, 9 * b + 7]), [a, 9 * b + 7])
    np.testing.assert_allclose(found, wider, err_msg="the scale of a scorer is no weight")


def test_a_scorer_that_says_one_thing_of_all_images_is_refused():
    with pytest.raises(UserError, match="b gives all 2 images the same score"):
        scale.voters(["a", "b"], [1, 1], [1, 1], [np.array([1.0, 2.0]), np.array([3.0, 3.0])])


def test_labels_are_0_half_and_1_and_differences_up_to_the_margin_are_ties():
    apart = np.array([0.3, -0.3, 0.1, -0.1, 0.0, NAN])
    np.testing.assert_equal(scale.labels(apart, 0.1), [1, 0, 0.5, 0.5, 0.5, NAN])
    np.testing.assert_equal(scale.labels(apart, 0.0), [1, 0, 1, 0, 0.5, NAN])


def test_probabilities_are_sigmoids_without_overflow():
    apart = np.array([-1e6, -1.0, 0.0, 0.5, 1e6])
    with np.errstate(all="raise"):
        found = scale.probabilities(apart, 4.0)
    np.testing.assert_allclose(found, [0, 1 / (1 + math.exp(4)), 0.5, 1 / (1 + math.exp(-2)), 1])


def test_the_fit_finds_the_slope_and_is_the_top_of_the_likelihood():
    apart, said, captions = simulated()
    fit = scale.fitted(apart, said, captions, before=1.0)
    assert fit.temperature == pytest.approx(2.5, abs=0.3) and fit.pairs + fit.held_out == 4000
    assert fit.after > fit.before and fit.after > fit.sure, "on prompts that it was not fitted on"
    top = optimize.minimize_scalar(
        lambda t: -scale.log_likelihood(scale.probabilities(apart, t), said), bounds=(0, 20), method="bounded"
    )
    assert scale._largest(apart, said) == pytest.approx(top.x, abs=1e-4)


def test_what_is_fitted_and_what_judges_share_no_prompt():
    apart, said, captions = simulated()
    fit = scale.fitted(apart, said, captions, 1.0)
    by_prompt = scale.fitted(np.repeat(apart, 2), np.repeat(said, 2), np.repeat(captions, 2), 1.0)
    assert (by_prompt.pairs, by_prompt.held_out) == (2 * fit.pairs, 2 * fit.held_out), "a prompt is on one side whole"
    assert by_prompt.temperature == pytest.approx(fit.temperature)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (lambda apart: (apart < 0).astype(float), "the labels do not follow the scores"),
        (lambda apart: (apart > 0).astype(float), "every label follows the scores"),
        (lambda apart: np.full(len(apart), NAN), "there are 0: give --temperature"),
    ],
)
def test_labels_that_give_no_temperature_are_one_line(labels, words):
    apart, _, captions = simulated(200)
    with pytest.raises(UserError, match=words) as caught:
        scale.fitted(apart, labels(apart), captions, 1.0)
    assert "\n" not in str(caught.value)


def test_agreement_counts_pairs_that_are_no_tie_in_either():
    new, old = np.array([1, 0, 0.5, 1, NAN, 1]), np.array([0.9, 0.2, 1, 0.5, 1, 0.1])
    found = scale.agreement(new, old, np.arange(6))
    assert found.pairs == 3 and found.share == pytest.approx(2 / 3)
    assert scale.agreement(new, np.full(6, NAN), np.arange(6)) is None


def test_the_interval_of_an_agreement_knows_that_pairs_of_a_caption_go_together():
    """Over simulated sets whose captions agree wholly or not at all it covers as often as it says; pairs alone would not."""
    inside = 0
    for seed in range(200):
        dice = np.random.default_rng(seed)
        right = dice.random(60) < 0.8
        old, captions = np.repeat(right, 8).astype(float), np.repeat(np.arange(60), 8)
        low, high = scale.agreement(np.ones(480), old, captions).interval
        inside += low <= 0.8 <= high
    assert inside >= stats.binom.ppf(0.001, 200, 0.95)
    alone = scale.agreement(np.ones(480), np.repeat(np.arange(60) < 48, 8).astype(float), np.arange(480)).interval
    together = scale.agreement(
        np.ones(480), np.repeat(np.arange(60) < 48, 8).astype(float), np.repeat(np.arange(60), 8)
    ).interval
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])

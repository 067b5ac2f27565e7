"""Agreement and strengths: against tables worked out by hand, evalica, and simulated raters."""

import evalica
import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from dpo.voting import agreement, tally
from tests.help.simulated import alike, beta, study, vote


def votes(table, prompt=None):
    """Votes from a table of raters (rows) and items (columns), nan for none; an item is a prompt unless said otherwise."""
    table = np.asarray(table, float)
    rater, item = np.nonzero(np.isfinite(table))
    prompts = item if prompt is None else np.asarray(prompt)[item]
    return tally.Votes(prompts, item, rater, table[rater, item], np.zeros(len(item), bool))


# --- with each other ----------------------------------------------------------------------------------------------------

NAN = np.nan


def test_alpha_by_hand():
    """Items with votes ++-, +-, --, ++ and one alone, which does not count.

    Of 9 values 5 are + and 4 are -. Observed: (4 / 2 + 2 / 1) / 9. By chance: (81 - 25 - 16) / (9 * 8).
    """
    found = agreement.alpha(votes([[1, 1, -1, 1, 1], [1, -1, -1, 1, NAN], [-1, NAN, NAN, NAN, NAN]]))
    assert found.alpha == pytest.approx(1 - (4 / 9) / (40 / 72))
    assert (found.items, found.votes) == (4, 9)


def test_alpha_of_two_raters_and_three_values_by_hand():
    """Krippendorff's coincidences of pairs (+,+) (+,0) (-,-) (0,0): 2 of 8 differ; by chance (64 - 9 - 9 - 4) / 56."""
    found = agreement.alpha(votes([[1, 1, -1, 0], [1, 0, -1, 0]]))
    assert found.alpha == pytest.approx(1 - (2 / 8) / ((64 - 9 - 9 - 4) / 56))


@pytest.mark.parametrize("seed", range(6))
def test_alpha_is_evalicas(seed):
    rng = np.random.default_rng(seed)
    table = rng.choice([1.0, -1.0, 0.0, NAN], (rng.integers(2, 9), rng.integers(3, 40)), p=[0.4, 0.2, 0.1, 0.3])
    expected = evalica.alpha(pd.DataFrame(table), distance="nominal").alpha
    assert agreement.alpha(votes(table)).alpha == pytest.approx(expected, abs=1e-12)


def test_alpha_has_its_ends_and_none_where_it_has_no_meaning():
    assert agreement.alpha(votes([[1, -1, 1], [1, -1, 1]])).alpha == pytest.approx(1.0)
    opposed = agreement.alpha(votes([[1, -1] * 10, [-1, 1] * 10]))
    assert opposed.alpha == pytest.approx(1 - 39 / 20)  # everything differs; by chance 20 * 20 * 2 of 40 * 39
    for table in ([[1, 1, 1], [1, 1, 1]], [[1, NAN], [NAN, -1]], np.zeros((0, 0))):
        found = agreement.alpha(votes(table))
        assert (found.alpha, found.interval) == (None, None)
    assert agreement.alpha(votes([[1], [-1]])).interval is None, "one prompt has no interval"


def test_items_of_one_prompt_are_resampled_together():
    """Ten copies of each item, all of its own prompt: ten times the votes, and no more certainty."""
    rng = np.random.default_rng(1)
    table = np.where(rng.random((5, 30)) < rng.beta(3, 2, 30), 1.0, -1.0)
    alone = agreement.alpha(votes(table)).interval
    together = agreement.alpha(votes(np.repeat(table, 10, 1), np.repeat(np.arange(30), 10))).interval
    assert np.diff(together) == pytest.approx(np.diff(alone), rel=0.15)


def test_alphas_interval_covers():
    """Shares of votes that differ as Beta(a, b) have alpha 1 / (a + b + 1)."""
    hits = []
    for seed in range(60):
        declared = study(50)
        found = agreement.alpha(
            tally.votes(declared, vote(declared, beta(3, 2), seed), "general"), seed=seed, resamples=500
        )
        hits.append(found.interval[0] <= 1 / 6 <= found.interval[1])
    assert 0.90 <= np.mean(hits) <= 0.99


# --- each rater ---------------------------------------------------------------------------------------------------------


def test_a_vote_beside_the_others_majority_by_hand():
    """Items ++-, +-0, ++0: of the others' majorities that there are."""
    found = votes([[1, 1, 1], [1, -1, 1], [-1, 0, 0]])
    whole, by_rater = agreement.with_majority(found, ["ann", "bob", "cid"])
    # ann: others of item 0 even, of item 1 -, of item 2 +.  bob: 0 even, 1 +, 2 +.  cid: 0 ++, and ties left out.
    assert {name: (one.hits, one.of) for name, one in by_rater.items()} == {"ann": (1, 2), "bob": (1, 2), "cid": (0, 1)}
    assert (whole.hits, whole.of, whole.share) == (2, 5, 0.4)


def test_with_itself():
    whole, by_rater = agreement.with_itself([("ann", True), ("ann", False), ("bob", True)])
    assert (whole.hits, whole.of) == (2, 3) and by_rater["bob"].interval == pytest.approx((0.025, 1.0))
    nothing, nobody = agreement.with_itself([])
    assert (nothing.share, nothing.interval, nobody) == (0.5, (0.0, 1.0), {})


def test_who_always_chooses_the_left_is_found_and_nobody_else():
    declared = study(40, tie=True)
    given = vote(declared, beta(3, 2), 1, raters=8, ties=0.1, always={"rater 2": "left", "rater 5": "right"})
    found = agreement.sides(tally.votes(declared, given, "general"), tally.raters(given))
    assert set(found.biased) == {"rater 2", "rater 5"}
    assert found.by_rater["rater 2"].share == 1.0 and found.by_rater["rater 5"].share == 0.0
    assert found.all.of == sum(one.of for one in found.by_rater.values()) < 200, "ties have no side"


def test_a_taste_is_no_habit_wherever_the_model_stood():
    """One who always prefers a model, and saw it 60 times on the left and 31 times on the right."""
    stood = np.arange(91) < 60
    one = tally.Votes(np.arange(91), np.arange(91), np.zeros(91, int), np.ones(91), stood)
    found = agreement.sides(one, ["ann"])
    assert found.by_rater["ann"].hits == 60 and found.biased == {}
    other = tally.Votes(one.prompt, one.item, one.rater, np.where(stood, 1.0, -1.0), np.ones(91, bool))
    assert agreement.sides(other, ["ann"]).biased["ann"] < 1e-20


def test_fishers_test_is_scipys():
    random = np.random.default_rng(0)
    for table in [(0, 0, 0, 0), (3, 0, 0, 3), (5, 0, 7, 0), *random.integers(0, 30, (40, 4)).tolist()]:
        expected = fisher_exact(np.reshape(table, (2, 2))).pvalue
        assert agreement.fisher(*table) == pytest.approx(expected, rel=1e-6)


# --- many models --------------------------------------------------------------------------------------------------------


def trial(first, second, value):
    rows = np.arange(len(value))
    return np.array(first), np.array(second), tally.Votes(rows, rows, rows % 3, np.array(value, float), rows > 0)


def test_strengths_of_two_models_by_hand():
    """3 of 4 votes: the logarithm of 3; a tie counts one half for each."""
    found = agreement.strengths(*trial([0] * 4, [1] * 4, [1, 1, 1, -1]), ["base", "dpo"])
    assert [one.strength for one in found] == pytest.approx([0.0, np.log(3)])
    assert found[1].over_base == pytest.approx(0.75) and found[0].interval is None
    tied = agreement.strengths(*trial([0] * 4, [1] * 4, [1, 1, 0, 0]), ["base", "dpo"])
    assert tied[1].strength == pytest.approx(np.log(3))


def test_strengths_of_three_models_by_hand():
    """b beats a 2 to 1, c beats b 2 to 1, c beats a 4 to 1 in as many: strengths 1, 2 and 4 explain it exactly."""
    first = [0] * 3 + [1] * 3 + [0] * 5
    second = [1] * 3 + [2] * 3 + [2] * 5
    value = [1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1]
    found = agreement.strengths(*trial(first, second, value), ["a", "b", "c"], resamples=50)
    assert [one.strength for one in found] == pytest.approx([0.0, np.log(2), np.log(4)], abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_evalicas(seed):
    rng = np.random.default_rng(seed)
    pairs = np.array([sorted(rng.choice(4, 2, replace=False)) for _ in range(300)])
    value = rng.choice([1, -1, 0], 300, p=[0.5, 0.4, 0.1])
    names = ["a", "b", "c", "d"]
    said = [{1: evalica.Winner.X, -1: evalica.Winner.Y, 0: evalica.Winner.Draw}[one] for one in value.tolist()]
    expected = evalica.bradley_terry(
        [names[b] for _, b in pairs], [names[a] for a, _ in pairs], said, tolerance=1e-10
    ).scores
    found = agreement.strengths(*trial(pairs[:, 0], pairs[:, 1], value), names, resamples=50)
    assert [one.strength for one in found] == pytest.approx(
        [np.log(expected[name] / expected["a"]) for name in names], abs=1e-4
    )


def test_strengths_that_are_not_finite_are_none():
    assert agreement.strengths(*trial([0, 0], [1, 1], [1, 1]), ["base", "dpo"]) is None, "all won"
    assert agreement.strengths(*trial([0, 0], [1, 1], [1, -1]), ["base", "dpo", "dde"]) is None, "never compared"
    chain = trial([0, 0, 1, 1, 0], [1, 1, 2, 2, 2], [1, -1, 1, 1, 1])
    assert agreement.strengths(*chain, ["a", "b", "c"]) is None, "c won all"


def test_intervals_of_strengths_cover():
    """Three models of strengths 0, 0.4 and 0.8, and raters who differ."""
    true, names, hits = np.array([0.0, 0.4, 0.8]), ("a", "b", "c"), []
    declared = study(60, sides=names)
    gap = np.array([true[max(item.sides)] - true[min(item.sides)] for item in declared.items])
    for seed in range(40):
        given = vote(declared, lambda generator, count: 1 / (1 + np.exp(-gap)), seed, apart=0.2)
        found = tally.votes(declared, given, "general")
        models = np.array([tally.pair_of(declared.items[item]) for item in found.item])
        strong = agreement.strengths(models[:, 0], models[:, 1], found, names, seed=seed, resamples=300)
        hits += [one.interval[0] <= value <= one.interval[1] for one, value in zip(strong[1:], true[1:], strict=True)]
    assert 0.90 <= np.mean(hits) <= 0.995


def test_raters_who_differ_widen_the_intervals_of_strengths():
    """The same votes, once from three raters who each vote one way in most of them, once mixed."""
    value = np.array([1] * 60 + [-1, 1] * 30 + [-1] * 50 + [1] * 10)
    rows = np.arange(180)
    for_base, for_other = np.zeros(180, int), np.ones(180, int)
    apart, mixed = (tally.Votes(rows, rows, rater, value.astype(float), rows > 0) for rater in (rows // 60, rows % 3))
    wide, narrow = (
        np.diff(agreement.strengths(for_base, for_other, found, ["a", "b"])[1].interval) for found in (apart, mixed)
    )
    assert wide > 1.5 * narrow


def test_resamples_that_give_a_model_no_win_widen_the_interval():
    found = agreement.strengths(*trial([0] * 12, [1] * 12, [1] * 11 + [-1]), ["base", "dpo"])
    assert found[1].interval[0] < np.log(11) < 5 < found[1].interval[1] < 30
    assert np.isfinite(found[1].interval).all()


def test_prompts_alike_leave_no_agreement_beyond_chance():
    declared = study(200)
    found = agreement.alpha(tally.votes(declared, vote(declared, alike(0.6), 0), "general"))
    assert found.interval[0] < 0 < found.interval[1]

"""Win rates of majorities and of votes: by hand, and on simulated studies whose truth is known."""

import numpy as np
import pytest

from dpo.scorers.compare import advantage_interval, mean_interval
from dpo.voting import rates, tally
from tests.help.simulated import alike, beta, majority, study, vote


def votes(rows):
    """Votes from (prompt, item, rater, value)."""
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return tally.Votes(*columns[:3], columns[3].astype(float), np.zeros(len(rows), bool))


def test_majority_and_votes_by_hand():
    """Prompt 0: items 0 (2 of 3 for it) and 1 (a tie of 1 to 1 with one tie); prompt 1: item 2 (0 of 2)."""
    rows = [
        (0, 0, 0, 1),
        (0, 0, 1, 1),
        (0, 0, 2, -1),
        (0, 1, 0, 1),
        (0, 1, 1, -1),
        (0, 1, 2, 0),
        (1, 2, 0, -1),
        (1, 2, 1, -1),
    ]
    found = rates.compared(votes(rows))
    assert found.majority.win_rate == pytest.approx(((1 + 0.5) / 2 + 0) / 2)
    assert found.votes.win_rate == pytest.approx(((2 / 3 + 1 / 2) / 2 + 0) / 2)
    assert found.majority.ties == pytest.approx(0.25) and found.votes.ties == pytest.approx((0 + 1 / 3) / 4)
    assert (found.majority.prompts, found.majority.cases, found.votes.cases) == (2, 3, 8)
    assert (found.raters, found.fewest, found.most) == (3, 2, 3)
    assert found.p_sign == 1.0, "one prompt for it, one against"


def test_naming_the_models_the_other_way_round_mirrors_every_figure():
    given = tally.votes(study(60), vote(study(60), beta(3, 2), 5, apart=0.3, ties=0.1), "general")
    mirrored = tally.Votes(given.prompt, given.item, given.rater, -given.value, given.left)
    one, other = rates.compared(given), rates.compared(mirrored)
    for a, b in ((one.majority, other.majority), (one.votes, other.votes)):
        assert a.win_rate == 1 - b.win_rate and a.interval == (1 - b.interval[1], 1 - b.interval[0])


def test_raters_who_differ_widen_the_interval():
    """All five vote on all of 60 prompts: what they share does not average out over prompts."""
    rng = np.random.default_rng(0)
    rows = [(p, p, r, 1 if rng.random() < 0.6 else -1) for p in range(60) for r in range(5)]
    apart = [(p, i, r, -1 if r == 0 else v) for p, i, r, v in rows]
    narrow, wide = (rates.compared(votes(some)).votes.interval for some in (rows, apart))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_items_of_one_prompt_are_no_more_prompts_and_no_more_raters():
    """Each pair of images twice, with the same votes: nothing more is known."""
    once = [(p, p, r, -1 if r == 0 or (p + r) % 3 == 0 else 1) for p in range(60) for r in range(5)]
    twice = [(p, i + 60 * copy, r, v) for p, i, r, v in once for copy in range(2)]
    one, two = (rates.compared(votes(rows)) for rows in (once, twice))
    for a, b in ((one.votes, two.votes), (one.majority, two.majority)):
        assert a.win_rate == b.win_rate and np.diff(b.interval) == pytest.approx(np.diff(a.interval), rel=0.15)


@pytest.mark.parametrize(("against", "resampled"), [(10, True), (9, False)])
def test_the_interval_is_a_bootstraps_where_there_is_something_to_resample(against, resampled):
    values = np.array([-1.0] * against + [1.0] * 40)
    low, high = mean_interval(values)
    expected = (0.5 + low / 2, 0.5 + high / 2) if resampled else advantage_interval(values, len(values))
    assert rates.win_interval(values, len(values)) == pytest.approx(expected, abs=1e-12)


def test_the_error_of_raters_by_hand():
    """Two raters who add 0.3 and -0.1, in two votes each: 2 / 1 (0.09 + 0.01 - (0.04 + 0.01 + 0.01 + 0.04))."""
    parts, rater = np.array([0.2, 0.1, 0.1, -0.2]), np.array([0, 0, 1, 1])
    assert rates.rater_error(parts, rater) is None, "no more than single votes would scatter"
    found = rates.rater_error(np.array([0.2, 0.2, -0.1, -0.1]), rater)
    assert found is not None and found.freedom == 1
    assert found.error**2 == pytest.approx(2 * (0.16 + 0.04 - 0.1))
    assert rates.rater_error(parts, np.zeros(4, int)) is None


@pytest.mark.parametrize("value", [1, -1, 0])
def test_all_votes_alike(value):
    found = rates.compared(votes([(p, p, r, value) for p in range(20) for r in range(3)]))
    for one in (found.majority, found.votes):
        assert one.win_rate == (1 + value) / 2
        assert 0 <= one.interval[0] <= one.win_rate <= one.interval[1] <= 1 and one.interval[0] < one.interval[1]


def test_majorities_that_all_agree_though_votes_do_not():
    found = rates.compared(votes([(p, p, r, -1 if r == p % 3 else 1) for p in range(20) for r in range(3)]))
    assert found.majority.win_rate == 1.0 and 0.7 < found.majority.interval[0] < found.majority.interval[1] == 1.0
    assert found.votes.win_rate == pytest.approx(2 / 3)


def test_one_vote():
    found = rates.compared(votes([(0, 0, 0, 1)]))
    assert found.majority == found.votes and found.majority.interval[0] < 0.5


# --- the simulator, and what it says of the figures ---------------------------------------------------------------------


def test_a_majority_of_five_makes_more_of_the_votes():
    assert majority(alike(0.6)) == pytest.approx(0.683, abs=0.0005)
    assert majority(beta(3, 2)) == pytest.approx(0.643, abs=0.001)
    for chance, expected in ((alike(0.6), 0.683), (beta(3, 2), 0.643)):
        declared = study(2000)
        found = rates.compared(tally.votes(declared, vote(declared, chance, 1, raters=30), "general"), resamples=200)
        assert found.votes.win_rate == pytest.approx(0.6, abs=0.02)
        assert found.majority.win_rate == pytest.approx(expected, abs=0.03)


def test_simulated_raters_do_what_they_are_told():
    declared = study(300, repeats=0.2)
    given = vote(declared, alike(0.7), 2, raters=6, ties=0.2, always={"rater 1": "left"})
    usual = [one for one in given if one.rater != "rater 1"]
    assert np.mean([one.choice == "tie" for one in usual]) == pytest.approx(0.2, abs=0.02)
    assert {tally.on_left(one) for one in given if one.rater == "rater 1"} == {True}
    assert np.mean([one.repeat for one in given]) == pytest.approx(0.2 / 1.2, abs=0.02)
    cast = [(one.item, one.rater) for one in given if not one.repeat]
    assert len(cast) == len(set(cast)) == 1500, "five raters an item, each once"
    first = {(one.item, one.rater): one.left for one in given if not one.repeat}
    assert all(first[one.item, one.rater] != one.left for one in given if one.repeat), "repeats are swapped"


def coverage(prompts, raters, chance, *, studies, apart=0.0):
    """Shares of simulated studies whose intervals hold the true rate: of majorities, of votes."""
    declared = study(prompts)
    true = majority(chance), float(chance(np.random.default_rng(0), 1_000_000).mean())
    hits = np.zeros(2)
    for seed in range(studies):
        given = tally.votes(declared, vote(declared, chance, seed, raters=raters, apart=apart), "general")
        found = rates.compared(given, seed=seed, resamples=1000)
        hits += [
            one.interval[0] <= rate <= one.interval[1]
            for one, rate in zip((found.majority, found.votes), true, strict=True)
        ]
    return hits / studies


@pytest.mark.long
def test_intervals_cover():
    found = coverage(50, 8, beta(3, 2), studies=100, apart=0.2)
    assert (found >= 0.90).all() and (found <= 0.99).all(), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "raters", "chance", "apart"),
    [(40, 5, beta(3, 2), 0.0), (40, 12, beta(3, 2), 0.3), (100, 8, alike(0.6), 0.0), (100, 12, alike(0.9), 0.0),
     (200, 5, beta(3, 2), 0.3), (200, 12, beta(3, 2), 0.3), (200, 12, beta(6, 4), 0.0), (100, 40, beta(1, 1), 0.3)],
)  # fmt: skip
def test_intervals_of_200_studies_cover_in_90_to_99_of_100(prompts, raters, chance, apart):
    found = coverage(prompts, raters, chance, studies=200, apart=apart)
    assert (found >= 0.90).all() and (found <= 0.99).all(), found

"""What a study can show: the numbers that are told to people before anybody votes."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.voting import answers, plan, study
from tests.help import simulated


def test_the_numbers_that_are_told():
    assert (plan.for_width(0.05), plan.for_width(0.05, 2 / 3)) == (385, 342)
    assert (plan.to_show(0.55), plan.to_show(0.60)) == (783, 194)
    assert round(100 * plan.width(200)) == 7
    text = "\n".join(plan.lines())
    for part in (
        "+-5 points: 385 prompts (342 where one model wins two thirds)",
        "55% against 50% four times in five: 783 prompts",
        "60% against 50% four times in five: 194 prompts",
        "200 prompts: +-7 points",
        "60% of the votes, 5 on a prompt, make 68% of the majorities where prompts are alike, 64% where they differ",
    ):
        assert part in text


def test_such_numbers_of_prompts_show_what_they_say():
    """The least number has the power that was asked for, and one prompt fewer has not."""
    for share in (0.55, 0.6, 0.7):
        count = plan.to_show(share)
        assert plan.power(count, share) >= 0.8 > plan.power(count - 1, share)
    draws = np.random.default_rng(0).binomial(783, 0.55, 20_000)
    assert np.mean(np.abs(draws - 783 / 2) > plan.Z * np.sqrt(783) / 2) == pytest.approx(0.8, abs=0.02)


def test_a_majority_is_no_vote():
    assert plan.majority(0.6, 5) == pytest.approx(0.68256)  # 10 .6^3 .4^2 + 5 .6^4 .4 + .6^5
    assert plan.majority(0.6, 5, plan.ASSUMED) == pytest.approx(9 / 14)  # of Beta(3, 2), as counted below
    by_hand = sum(
        comb * a * b for comb, a, b in ((10, 3 * 4 * 5, 2 * 3), (5, 3 * 4 * 5 * 6, 2), (1, 3 * 4 * 5 * 6 * 7, 1))
    )
    assert by_hand / (5 * 6 * 7 * 8 * 9) == pytest.approx(9 / 14)
    assert [plan.majority(0.6, 1), plan.majority(0.6, 1, 0.5)] == pytest.approx([0.6, 0.6])
    assert plan.majority(0.6, 2) == pytest.approx(0.36 + 0.48 / 2), "a tie is one half"
    assert plan.majority(0.6, 5, 1.0) == 0.6, "people who always agree are one person"


def test_a_budget_goes_to_prompts_first():
    """More prompts with fewer votes each are never worse for either figure, until prompts end."""
    for share in (0.55, 0.6, 0.7):
        for alpha in (0.0, plan.ASSUMED, 0.5):
            ways = plan.splits(600, share, alpha)
            assert [way.prompts for way in ways] == [600, 200, 120, 85, 66]
            assert all(a.power >= b.power - 1e-9 and a.half <= b.half + 1e-9 for a, b in itertools.pairwise(ways))
    assert "best are 600 prompts with 1 vote each." in plan.lines(budget=600)[-2]
    assert (
        "best are 120 prompts with 5 votes each, as there are no more prompts."
        in plan.lines(budget=600, prompts=120)[-2]
    )
    assert plan.splits(600, 0.6, 0.1, most=50)[-1][:2] == (12, 50), "all of the budget on the prompts that there are"


def test_the_votes_of_a_budget_by_hand():
    """0.24 (1/6 + 5/6/5) / 200 is 0.02 squared."""
    way = plan.splits(1000, 0.6, 1 / 6)[2]
    assert way[:2] == (5, 200) and way.half == pytest.approx(1.96 * 0.02, abs=1e-5)
    assert way.majority == pytest.approx(9 / 14) and 0.985 < way.power < 0.995


def test_few_prompts_show_nothing():
    assert "too few to show anything" in plan.lines(prompts=5)[4]
    assert "25 votes a question" in plan.lines(prompts=5)[-2]


@pytest.fixture
def pilot(tmp_path):
    """A folder with a study of prompts that differ as Beta(3, 2), and its votes."""
    declared = simulated.study(400)
    study.write(tmp_path, declared)
    given = simulated.vote(declared, simulated.beta(3, 2), 3, ties=0.1)
    (tmp_path / answers.FILE).write_text("".join(json.dumps(asdict(one)) + "\n" for one in given))
    return tmp_path


def test_agreement_is_measured_in_a_pilot(pilot):
    alpha, votes = plan.measured(pilot)
    assert alpha == pytest.approx(1 / 6, abs=0.05) and 1700 < votes < 1900
    assert f"alpha) is {alpha:.2f}, measured on {votes:,} votes in {pilot}" in "\n".join(plan.lines(pilot=pilot))


def test_a_pilot_without_two_votes_on_anything_measures_nothing(tmp_path):
    declared = simulated.study(4, votes=1)
    study.write(tmp_path, declared)
    with pytest.raises(UserError, match="items with two votes"):
        plan.lines(pilot=tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"prompts": 0}, {"votes": 0}, {"budget": 0}, {"share": 0.5}, {"share": 1.0}, {"agreement": 1.5}]
)
def test_what_no_plan_can_be_made_of_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        plan.lines(**wrong)

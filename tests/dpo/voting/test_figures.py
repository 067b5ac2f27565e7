"""The figures of a report: whose votes count, what is said of them, and 200 simulated studies."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpo.voting.answers import Answer
from dpo.voting.figures import cautions, figures, numbered
from dpo.voting.study import Item, Question, Rule
from tests.help.simulated import alike, beta, majority, study, vote

CHECKS = tuple(Item(f"broken-{n}", "p", "", "broken", (-1, 1), ("x", "y"), ("", "")) for n in range(8))


def lines(declared, given):
    return "\n".join(figures(declared, given)["warnings"])


def test_two_figures_for_majorities_and_votes():
    declared = study(120, votes=5)
    found = figures(declared, vote(declared, beta(4, 2), 0, raters=8))
    (pair,) = found["questions"][0]["pairs"]
    assert (pair["base"], pair["other"], pair["enough"]) == ("start", "dpo", True)
    by_majority, by_vote = (pair["rule"][kind]["win_rate"] for kind in ("majority", "votes"))
    assert by_vote == pytest.approx(2 / 3, abs=0.04) and by_majority > by_vote
    assert by_majority == pytest.approx(majority(beta(4, 2)), abs=0.06)
    assert pair["p"] == pair["rule"]["p_sign"], "one comparison is adjusted for no other"
    assert pair["everyone"] == pair["rule"] and found["left_out"] == [] and found["warnings"] == []
    json.dumps(found, allow_nan=False)


def test_both_results_stand_there_where_the_rule_leaves_a_rater_out():
    """One of four raters chooses the left, sees no broken image, and half of the votes the other way are theirs."""
    declared = study(150, votes=4, extra=CHECKS)
    given = vote(declared, alike(0.75), 1, raters=4, always={"rater 2": "left"})
    found = figures(declared, given)
    pair, number = found["questions"][0]["pairs"][0], numbered(declared, given)["rater 2"]
    assert [one["rater"] for one in found["left_out"]] == [number]
    assert "checks with a broken image right, the rule asks for 75%" in found["left_out"][0]["reasons"][0]
    assert pair["rule"]["raters"] == 3 and pair["everyone"]["raters"] == 4
    assert pair["rule"]["votes"]["win_rate"] == pytest.approx(0.75, abs=0.04)
    assert pair["everyone"]["votes"]["win_rate"] == pytest.approx(0.6875, abs=0.04)
    forgiving = figures(replace(declared, rule=Rule(broken=0.0)), given)["questions"][0]["pairs"][0]
    assert forgiving["rule"] == forgiving["everyone"] == pair["everyone"]


def test_names_stay_out_of_the_figures():
    declared = study(10, extra=CHECKS)
    given = [
        replace(one, rater=f"Grace {one.rater}") for one in vote(declared, alike(0.6), 0, always={"rater 1": "left"})
    ]
    assert "Grace" not in json.dumps(figures(declared, given))
    names = numbered(declared, given)
    assert sorted(names.values()) == sorted(f"rater {n}" for n in range(1, 11))
    assert list(names) != sorted(names), "numbers do not follow the alphabet"


def test_the_order_of_the_answers_does_not_matter():
    declared = study(40, extra=CHECKS, repeats=0.1)
    given = vote(declared, beta(3, 2), 4, ties=0.1)
    assert figures(declared, given) == figures(declared, given[::-1])


def test_every_question_and_pair_has_its_line_and_p_is_adjusted_for_all():
    questions = (Question("general", "Which?"), Question("appeal", "Which looks better?"))
    declared = study(60, sides=("start", "dpo", "dde"), questions=questions)
    found = figures(declared, vote(declared, alike(0.6), 2))
    pairs = [pair for question in found["questions"] for pair in question["pairs"]]
    assert [(pair["base"], pair["other"]) for pair in pairs[:3]] == [("start", "dpo"), ("start", "dde"), ("dpo", "dde")]
    assert len(pairs) == 6 and all(pair["p"] >= pair["rule"]["p_sign"] for pair in pairs)
    assert min(pair["p"] for pair in pairs) == pytest.approx(min(1, 6 * min(pair["rule"]["p_sign"] for pair in pairs)))
    for question in found["questions"]:
        assert [one["side"] for one in question["strengths"]] == ["start", "dpo", "dde"]
    assert figures(study(9), vote(study(9), alike(0.6), 2))["questions"][0]["strengths"] is None, "two models need none"


def test_categories():
    declared = study(30)
    items = tuple(replace(item, category="odd" if n % 2 else "") for n, item in enumerate(declared.items))
    declared = replace(declared, items=items)
    found = figures(declared, vote(declared, alike(0.6), 2))["questions"][0]["pairs"][0]
    assert list(found["categories"]) == ["odd"] and found["categories"]["odd"]["majority"]["prompts"] == 15


def test_what_should_make_one_wary():
    declared = study(30)
    given = vote(declared, alike(0.6), 2)
    assert "75 of 150 votes that the study wants were cast" in lines(declared, given[:75])
    alone = study(30, votes=1)
    said = lines(alone, vote(alone, alike(0.6), 2, raters=1))
    assert "one rater" in said and "one vote an item is no majority" in said
    assert "half of the answers took less than 0.2 s" in lines(declared, [replace(one, seconds=0.2) for one in given])
    assert "raters agree no more than by chance" in lines(declared, vote(declared, alike(0.5), 3))
    leaning = lines(declared, vote(declared, alike(0.5), 3, always={f"rater {n}": "left" for n in range(10)}))
    assert "chose one side of the screen, whatever stood there, more often than chance explains" in leaning
    assert "no vote" in lines(declared, [])


def test_results_that_turn_with_the_rule_or_the_way_of_counting_are_said():
    content = figures(study(30), vote(study(30), alike(0.8), 2))
    pair = content["questions"][0]["pairs"][0]
    against = {"win_rate": 0.3, "interval": (0.2, 0.4)}
    pair["everyone"] = {**pair["everyone"], "majority": {**pair["everyone"]["majority"], **against}}
    pair["rule"] = {**pair["rule"], "votes": {**pair["rule"]["votes"], **against}}
    assert cautions(content)[:2] == [
        "general: dpo against start: without the raters whom the rule leaves out dpo is preferred, with them start is preferred",
        "general: dpo against start: by majority dpo is preferred, by votes start is preferred",
    ]


def outcome(seed, prompts=60):
    """(known rates are inside, who was named) of a simulated study with a rater who always says left."""
    declared = study(prompts, repeats=0.05, extra=CHECKS)
    given = vote(declared, beta(3, 2), seed, raters=8, apart=0.2, always={"rater 3": "left"})
    found, names = figures(declared, given), {number: name for name, number in numbered(declared, given).items()}
    pair = found["questions"][0]["pairs"][0]
    true = {"majority": majority(beta(3, 2)), "votes": 0.6}
    inside = [
        pair["rule"][kind]["interval"][0] <= rate <= pair["rule"][kind]["interval"][1] for kind, rate in true.items()
    ]
    return inside, {names[number] for number in found["biased"]}, {names[one["rater"]] for one in found["left_out"]}


def test_a_known_rate_is_recovered_and_who_always_says_left_is_named():
    inside, named, _ = outcome(1)
    assert inside == [True, True] and named == {"rater 3"}


@pytest.mark.slow
def test_200_simulated_studies():
    """Intervals cover, the rater who always says left is found each time, and hardly ever anybody else."""
    found = [outcome(seed) for seed in range(200)]
    cover = np.mean([inside for inside, _, _ in found], 0)
    assert (cover >= 0.90).all() and (cover <= 0.99).all(), cover
    assert all("rater 3" in named for _, named, _ in found)
    assert np.mean([len(named) > 1 for _, named, _ in found]) <= 0.08, "5 % by chance"
    assert all(out <= {"rater 3"} for _, _, out in found), "who sees broken images is left out by nobody"


def test_an_interval_alone_is_not_enough():
    """Ten of twelve prompts: the interval leaves one half out, the adjusted p of three questions does not."""
    declared = study(12, questions=tuple(Question(f"q{n}", "Which?") for n in range(3)))
    given = []
    for number, item in enumerate(item for item in declared.items if item.kind == "vote"):
        for question in declared.questions:
            later = 0 if item.sides[0] > item.sides[1] else 1
            chosen = later if number < 10 else 1 - later
            given.append(
                Answer(
                    f"{number}{question.key}",
                    "ann",
                    item.id,
                    question.key,
                    ("first", "second")[chosen],
                    number % 2,
                    False,
                    1.0,
                    "",
                )
            )
    found = figures(declared, given)
    for question in found["questions"]:
        (pair,) = question["pairs"]
        assert pair["rule"]["majority"]["interval"][0] > 0.5 and pair["p"] > 0.05 and pair["enough"] is False

"""Votes as arrays: what is one, for whom it is, where it stood; and who is left out."""

import pytest

from dpo.voting import tally
from dpo.voting.answers import Answer
from dpo.voting.study import Item, Rule
from tests.help import simulated

EXTRA = (
    Item("broken-1", "p", "", "broken", (-1, 1), ("x", "y"), ("", "")),
    Item("broken-2", "p", "", "broken", (0, -1), ("x", "y"), ("", "")),
    Item("same", "p", "", "same", (1, 1), ("x", "x"), ("", "")),
)
STUDY = simulated.study(2, extra=EXTRA)  # i0 shows (1, 0), i1 shows (0, 1)


def answer(item, choice, left=0, rater="ann", question="general", repeat=False):
    return Answer(f"{rater}{item}{question}{repeat}", rater, item, question, choice, left, repeat, 2.0, "2026-01-01")


@pytest.mark.parametrize(
    ("item", "choice", "value"),
    [("i0", "first", 1), ("i0", "second", -1), ("i1", "first", -1), ("i1", "second", 1), ("i1", "tie", 0)],
)
def test_a_vote_is_for_a_model_wherever_its_image_stands(item, choice, value):
    found = tally.votes(STUDY, [answer(item, choice)], "general")
    assert found.value.tolist() == [value]


@pytest.mark.parametrize(
    ("choice", "left", "stood"), [("first", 0, True), ("first", 1, False), ("second", 1, True), ("second", 0, False)]
)
def test_where_the_chosen_image_stood(choice, left, stood):
    assert tally.votes(STUDY, [answer("i0", choice, left)], "general").left.tolist() == [stood]


def test_checks_repeats_and_other_questions_are_no_votes():
    given = [
        answer("i0", "first"),
        answer("i0", "first", repeat=True),
        answer("broken-1", "second"),
        answer("same", "first"),
    ]
    given += [answer("i1", "first", question="appeal"), answer("gone", "first"), answer("i1", "first", rater="bob")]
    found = tally.votes(STUDY, given, "general", without=["bob"])
    assert found.item.tolist() == [0] and found.rater.tolist() == [0]
    assert tally.votes(STUDY, given, "general").rater.tolist() == [0, 1]
    assert len(tally.votes(STUDY, given, "general", (0, 2)).value) == 0, "of another pair"


def test_the_order_of_answers_does_not_matter():
    given = simulated.vote(simulated.study(20), simulated.beta(3, 2), 1)
    one, other = (tally.votes(simulated.study(20), order, "general") for order in (given, given[::-1]))
    assert all(
        getattr(one, name).tolist() == getattr(other, name).tolist()
        for name in ("prompt", "item", "rater", "value", "left")
    )


def test_who_takes_a_broken_image_for_a_sound_one_is_left_out():
    given = [answer("broken-1", "second"), answer("broken-2", "first")]  # all right
    given += [answer("broken-1", "second", rater="bob"), answer("broken-2", "tie", rater="bob")]
    given += [answer("i0", "first", rater="cid")]  # met no check
    assert tally.left_out(STUDY, given) == {"bob": ["1 of 2 checks with a broken image right, the rule asks for 75%"]}
    assert tally.left_out(simulated.study(2, extra=EXTRA, rule=Rule(broken=0.5)), given) == {}


def test_who_answers_otherwise_when_asked_again_is_left_out_where_the_rule_says_so():
    given = [
        answer("i0", "first"),
        answer("i0", "second", repeat=True),
        answer("i1", "tie"),
        answer("i1", "tie", repeat=True),
    ]
    given += [answer("i0", "first", rater="bob"), answer("i1", "tie", rater="bob", repeat=True)]  # its first was undone
    assert tally.repeated(list(tally.answered(STUDY, given))) == [("ann", False), ("ann", True)]
    assert tally.left_out(STUDY, given) == {}
    strict = simulated.study(2, rule=Rule(broken=0.75, repeats=0.6))
    assert tally.left_out(strict, given) == {"ann": ["1 of 2 repeated questions answered alike, the rule asks for 60%"]}


def test_pairs_of_models():
    assert tally.pairs(simulated.study(9, sides=("a", "b", "c"))) == [(0, 1), (0, 2), (1, 2)]

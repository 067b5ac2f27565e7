"""What is asked next: fewest votes first, once a rater, sides balanced, repeats swapped, checks through the run."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from dpo.voting.answers import Answer
from dpo.voting.asking import BLOCK, FIRST_CHECK, GAP, Tally, following, progress, wanted
from tests.help.votes import imagined


def give(tally, rater, asked, choice="first"):
    number = sum(map(len, tally.given.values()))
    tally.add(Answer(f"{number:032x}", rater, asked.item, asked.question, choice, asked.left, asked.repeat, 1.0, "now"))


def run(study, raters, seed=0, most=10_000):
    """Raters who answer in turns drawn at random, until there is nothing left; what each was asked, and the tally."""
    tally, asked, draw = Tally(study), {rater: [] for rater in raters}, random.Random(seed)
    left = list(raters)
    while left and sum(map(len, asked.values())) < most:
        rater = draw.choice(left)
        found = following(tally, rater)
        if found is None:
            left.remove(rater)
            continue
        give(tally, rater, found)
        asked[rater].append(found)
    return asked, tally


def kind(asked):
    return asked.item.rstrip("0123456789")


def test_every_question_gets_the_votes_wanted_and_none_comes_twice_to_a_rater():
    study = imagined(items=12, questions="ab", checks=2, repeats=0.1)
    asked, tally = run(study, "ABCDE")
    assert set(tally.votes.values()) == {3} and len(tally.votes) == 24
    for mine in asked.values():
        first = [(one.item, one.question) for one in mine if not one.repeat]
        assert len(set(first)) == len(first)
        again = [(one.item, one.question) for one in mine if one.repeat]
        assert len(set(again)) == len(again) and set(again) <= set(first)
        assert all(kind(one) == "vote" for one in mine if one.repeat)


def test_those_with_the_fewest_votes_come_first_at_every_moment():
    study = imagined(items=15, questions="ab", checks=0, repeats=0.0)
    tally, draw = Tally(study), random.Random(1)
    while True:
        open_to = [rater for rater in "ABCD" if following(tally, rater) is not None]
        if not open_to:
            break
        rater = draw.choice(open_to)
        found = following(tally, rater)
        mine = [key for key in tally.plan(rater).order if key not in tally.asked[rater]]
        assert tally.votes[found.item, found.question] == min(tally.votes[key] for key in mine)
        give(tally, rater, found)
    assert set(tally.votes.values()) == {3}


@pytest.mark.parametrize("votes", [2, 3, 5])
def test_sides_are_balanced_over_the_raters_of_a_question(votes):
    study = replace(imagined(items=20, questions="abc", checks=0, repeats=0.0), votes=votes)
    _, tally = run(study, "ABCDEFG"[: votes + 1])
    for key, count in tally.votes.items():
        assert count == votes and abs(count - 2 * tally.lefts[key]) <= 1
    majority = sum(2 * tally.lefts[key] > votes for key in tally.votes)
    if votes % 2:  # the odd one falls on either side
        assert 0.25 < majority / len(tally.votes) < 0.75


def test_it_is_a_function_of_the_answers_alone_and_another_seed_asks_otherwise():
    study = imagined(items=12, questions="ab")
    asked, tally = run(study, "ABC", most=40)
    answers = sorted((one for given in tally.given.values() for one in given), key=lambda one: one.id)
    for anew in (Tally(study, answers), _by_detours(study, answers)):
        for rater in "ABCD":
            assert following(anew, rater) == following(tally, rater)
            assert progress(anew, rater) == progress(tally, rater)
            assert wanted(anew, rater) == wanted(tally, rater)
    other, _ = run(imagined(items=12, questions="ab", seed=1), "ABC", most=40)
    assert other != asked


def _by_detours(study, answers):
    """The same tally after answers that were taken back again."""
    tally = Tally(study)
    for answer in answers:
        tally.add(answer)
        tally.take_back(answer)
        tally.add(answer)
    return tally


def test_a_twentieth_comes_again_with_sides_swapped_after_other_questions():
    study = imagined(items=60, questions="a", checks=2, repeats=0.05)
    asked, _ = run(study, "A")
    mine = asked["A"]
    again = [place for place, one in enumerate(mine) if one.repeat]
    assert len(again) == 3  # of 60
    for place in again:
        before = next(
            p for p, one in enumerate(mine) if (one.item, one.question) == (mine[place].item, mine[place].question)
        )
        assert mine[before].left == 1 - mine[place].left and place - before > GAP
    assert not any(one.repeat for one in run(imagined(items=60, repeats=0.0), "A")[0]["A"])


def test_a_repeat_comes_at_once_where_nothing_else_is_left():
    asked, _ = run(imagined(items=3, checks=0, repeats=0.5), "A")
    assert [one.repeat for one in asked["A"]] == [False, False, False, True, True]


def test_checks_come_early_and_through_the_whole_run():
    study = imagined(items=80, questions="a", checks=2, repeats=0.0)
    asked, _ = run(study, "AB")
    places = [[place for place, one in enumerate(mine) if kind(one) != "vote"] for mine in asked.values()]
    for mine, found in zip(asked.values(), places, strict=True):
        assert len(found) == 4 and FIRST_CHECK[0] <= found[0] <= FIRST_CHECK[1]
        assert [kind(mine[place]) for place in found] == ["broken", "same", "broken", "same"]
        assert all(5 <= after - before <= 40 for before, after in pairwise(found)) and found[-1] > 40
    assert places[0] != places[1]
    lefts = Counter(
        one.left
        for rater in range(40)
        for one in run(study, [f"r{rater}"], most=6)[0][f"r{rater}"]
        if kind(one) == "broken"
    )
    assert 8 < lefts[0] < 32  # the broken image is not always on one side


def test_checks_are_no_further_apart_in_a_long_study_and_a_short_one_has_them_too():
    long, _ = run(imagined(items=900, checks=3, repeats=0.0), "A", most=140)
    assert sum(kind(one) != "vote" for one in long["A"]) >= 5
    short, _ = run(imagined(items=1, checks=2, repeats=0.0), "A")
    assert kind(short["A"][0]) == "vote" and len(short["A"]) == 5


def test_questions_that_others_hold_count_as_votes_to_come():
    study = imagined(items=4, checks=0, repeats=0.0)  # three votes each
    tally, held = Tally(study), []
    for rater in "ABCDEFGHIJKLMNOP":
        found = following(tally, rater, held)
        if found is not None:
            held.append((rater, found))
    assert len(held) == 12 and set(Counter(one.item for _, one in held).values()) == {3}
    for item in ("vote0", "vote1"):
        lefts = [one.left for _, one in held if one.item == item]
        assert abs(len(lefts) - 2 * sum(lefts)) <= 1
    assert following(tally, "Z", held) is None and len(wanted(tally, "Z")) == 4
    assert following(tally, "Z", held[1:]) is not None  # given back


def test_what_a_rater_holds_is_not_asked_twice_and_counts_as_given():
    study = imagined(items=30, questions="a", checks=2, repeats=0.1)
    tally, held = Tally(study), []
    for _ in range(30):
        held.append(("A", following(tally, "A", held)))
    keys = [(one.item, one.question) for _, one in held if not one.repeat]
    assert len(set(keys)) == len(keys) and any(kind(one) != "vote" for _, one in held)


def test_the_kind_of_question_stays_for_a_while():
    study = imagined(items=60, questions="abc", checks=0, repeats=0.0)
    asked, _ = run(study, "A", most=60)
    changes = sum(one.question != other.question for one, other in pairwise(asked["A"]))
    assert changes <= 60 // BLOCK
    assert set(Counter(one.question for one in asked["A"]).values()) == {20}


def test_progress_counts_down_to_nothing():
    study = imagined(items=21, questions="ab", checks=2, repeats=0.1)
    tally, seen = Tally(study), []
    while (found := following(tally, "A")) is not None:
        seen.append(progress(tally, "A"))
        give(tally, "A", found)
    assert [far.done for far in seen] == list(range(len(seen)))
    assert {far.done + far.left for far in seen} == {len(seen)}
    assert progress(tally, "A").left == 0

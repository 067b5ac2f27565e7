"""Which images of a prompt are paired: against written-out choices, keyed, and no image with its equal."""

from itertools import combinations

import numpy as np
import pytest

from dpo.pairing.choose import Rule, how_many, paired, preferred

PROMPTS = [f"prompt {number}" for number in range(40)]
PROMPT = np.tile(np.arange(40), 5)  # images of a prompt do not stand together
SCORES = np.random.default_rng(0).normal(size=200)


def pairs(pairing="best-worst", per_prompt=1, min_margin=0.0, seed=0, scores=SCORES, uid=str, prompts=PROMPTS):
    return paired(
        prompts, PROMPT, scores, uid, pairing=pairing, per_prompt=per_prompt, min_margin=min_margin, seed=seed
    )


def test_best_against_worst():
    found = pairs()
    assert len(found) == 40 and [PROMPT[a] for a, _ in found] == list(range(40))
    for prompt, (a, b) in enumerate(found):
        images = np.flatnonzero(prompt == PROMPT)
        assert {a, b} == {images[SCORES[images].argmax()], images[SCORES[images].argmin()]}


def test_all_and_the_least_margin():
    found = pairs("all")
    assert len(found) == 400 and {tuple(sorted(pair)) for pair in found} == {
        (a, b) for a, b in combinations(range(200), 2) if PROMPT[a] == PROMPT[b]
    }
    far = pairs("all", min_margin=1.0)
    assert set(far) < set(found) and len(far) == sum(abs(SCORES[a] - SCORES[b]) >= 1 for a, b in found)


def test_random_ones_are_keyed():
    found = pairs("random", 3, 0.5)
    assert found == pairs("random", 3, 0.5) != pairs("random", 3, 0.5, seed=1)
    assert set(found) <= set(pairs("all", min_margin=0.5)) and len(set(found)) == len(found)
    assert max(np.bincount([PROMPT[a] for a, _ in found])) == 3
    assert {tuple(sorted(one)) for one in pairs("random", 1, 0.5)} < {tuple(sorted(one)) for one in found}, (
        "fewer are some of more"
    )


def test_which_image_stands_first_tells_nothing():
    found = pairs("all")
    better = np.mean([SCORES[a] > SCORES[b] for a, b in found])
    assert 0.4 < better < 0.6 and 0.4 < np.mean([a < b for a, b in found]) < 0.6
    turned = pairs("all", scores=-SCORES)
    assert set(turned) == set(found), "sides do not depend on the scores"


def test_equal_images_and_images_without_a_score_are_not_paired():
    assert pairs("all", uid=lambda place: "the same") == []
    scores = SCORES.copy()
    scores[PROMPT < 39] = np.nan
    scores[39] = np.nan
    assert {place for pair in pairs("all", scores=scores) for place in pair} == {79, 119, 159, 199}
    assert pairs(scores=np.full(200, np.nan)) == [] and len(pairs(scores=np.ones(200))) == 40


@pytest.mark.parametrize("pairing", ["best-worst", "all", "random"])
def test_one_image_of_a_prompt_makes_no_pair(pairing):
    scores = np.where(np.arange(200) < 40, SCORES, np.nan)
    assert pairs(pairing, scores=scores) == []


# --- pairs of a ranking: exact, from small ones ------------------------------------------------------------------------

ONE = np.zeros(5, dtype=np.int64)


def made(scores, rule, group=ONE, uid=str):
    return preferred(["a", "b"], group, np.array(scores, dtype=np.float64), uid, rule)


def test_a_ranking_with_ties_makes_exactly_these_pairs():
    ranks = [-1, -2, -2, -4, -3]  # 1 is best
    assert made(ranks, Rule("all")) == (
        [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4), (4, 3)], 1, 0, 0, 0,
    )  # fmt: skip
    assert made(ranks, Rule("neighbours")).pairs == [(0, 1), (0, 2), (1, 4), (2, 4), (4, 3)]
    assert made(ranks, Rule("best-worst")) == ([(0, 3)], 1, 0, 0, 0)
    assert made([2, 2, 2, 2, 2], Rule("all")) == ([], 10, 0, 0, 0) == made([2, 2, 2, 2, 2], Rule("best-worst"))
    assert made([1, 2, np.nan, np.nan, 9], Rule("all"), np.array([0, 0, 0, 1, 1])).pairs == [(1, 0)]


def test_a_margin_counts_what_it_leaves_out_and_rounding_does_not_decide():
    assert made([0.1, 0.3, 0.0, 9, 9], Rule("all", min_margin=0.2), np.array([0, 0, 1, 1, 0])) == (
        [(1, 0), (4, 0), (4, 1), (3, 2)], 0, 0, 0, 0,
    )  # fmt: skip
    found = made([1, 2, 4, 7, 7.5], Rule("neighbours", min_margin=2))
    assert found.pairs == [(2, 1), (3, 2)] and found.narrow == 2 and found.ties == 0


def test_one_picture_twice_is_no_pair_and_is_counted():
    found = made([1, 2, 3, 4, 5], Rule("all"), uid=lambda image: str(image % 4))
    assert found.same == 1 and (4, 0) not in found.pairs and len(found.pairs) == 9


def test_no_image_is_in_more_pairs_than_wanted_whatever_order_the_rows_have():
    scores = np.arange(20.0)
    group = np.zeros(20, dtype=np.int64)
    found = preferred(["a"], group, scores, str, Rule("all", most=3))
    times = np.bincount(np.array(found.pairs).reshape(-1), minlength=20)
    assert times.max() == 3 and times.min() >= 2 and found.crowded == 190 - len(found.pairs)
    assert all(better > worse for better, worse in found.pairs)
    turned = preferred(["a"], group, scores[::-1], lambda image: str(19 - image), Rule("all", most=3))
    assert {(19 - a, 19 - b) for a, b in turned.pairs} == set(found.pairs)
    assert preferred(["a"], group, scores, str, Rule("all", most=3, seed=1)).pairs != found.pairs


@pytest.mark.parametrize("pairing", ["all", "neighbours", "best-worst"])
def test_pairs_are_counted_before_they_are_made(pairing):
    scores = np.round(SCORES, 0)  # with ties
    made = preferred(PROMPTS, PROMPT, scores, str, Rule(pairing))
    assert how_many(PROMPT, scores, pairing) == len(made.pairs) > 30

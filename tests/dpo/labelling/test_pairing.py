"""Which images of a prompt are paired: against written-out choices, keyed, and no image with its equal."""

from itertools import combinations

import numpy as np
import pytest

from dpo.labelling.pairing import paired

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

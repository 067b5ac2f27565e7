"""One result from scores: the right images are compared, whatever the order, and swapping the sides mirrors it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpo.evaluating.result import Group, Measure, adjusted, cautions, compared, table
from dpo.evaluating.sides import Shown, Side
from dpo.scorers import compare

MEASURE = Measure("taste", "f0")
PROMPTS = [f"prompt {i}" for i in range(30)]


def side(name, seeds=(0, 1), prompts=PROMPTS):
    shown = [
        Shown(Path(f"{name}/{i}-{seed}.png"), prompt, seed, "even" if i % 2 == 0 else "odd")
        for i, prompt in enumerate(prompts)
        for seed in seeds
    ]
    return Side(name, Path(name), tuple(shown))


def scores(*sides, shift=0.0, rng=None):
    rng = rng or np.random.default_rng(0)
    return {(one.name, MEASURE.name): rng.normal(size=len(one.images)) + shift * i for i, one in enumerate(sides)}


def test_the_figures_are_those_of_the_paired_scores():
    a, b = side("a"), side("b")
    found = scores(a, b, shift=0.5)
    order = np.random.default_rng(1).permutation(len(b.images))
    shuffled = replace(b, images=tuple(b.images[i] for i in order))
    values = {("a", "taste"): found["a", "taste"], ("b", "taste"): found["b", "taste"][order]}
    entry = compared(a, Group("b", (shuffled,)), MEASURE, values)
    prompt = np.repeat(np.arange(30), 2)
    expected = compare.paired(prompt, found["a", "taste"], found["b", "taste"])
    assert {name: entry["paired"][name] for name in ("win_rate", "difference", "prompts", "images", "p_sign")} == {
        name: getattr(expected, name) for name in ("win_rate", "difference", "prompts", "images", "p_sign")
    }
    assert entry["categories"].keys() == {"even", "odd"} and entry["categories"]["odd"]["prompts"] == 15
    assert entry["worth"]["limit"] == 2 and entry["worth"]["n"] > 1


def test_a_side_against_itself_is_one_half_and_swapped_sides_mirror():
    a, b = side("a"), side("b")
    found = scores(a, b, shift=0.3)
    same = compared(a, Group("a", (a,)), MEASURE, found)
    assert same["paired"]["win_rate"] == 0.5 and same["paired"]["ties"] == 1.0 and same["gains"] == same["losses"] == []
    there, back = (compared(x, Group(y.name, (y,)), MEASURE, found) for x, y in ((a, b), (b, a)))
    assert there["paired"]["win_rate"] == 1 - back["paired"]["win_rate"]
    assert there["paired"]["difference"] == -back["paired"]["difference"]
    assert [row[0] for row in there["gains"]] == [row[0] for row in back["losses"]]


def test_the_examples_are_the_extremes_of_the_prompts_means():
    a, b = side("a"), side("b")
    found = {("a", "taste"): np.zeros(60), ("b", "taste"): np.repeat(np.arange(30) - 14.5, 2)}
    entry = compared(a, Group("b", (b,)), MEASURE, found)
    assert [row[0] for row in entry["gains"]] == [f"prompt {i}" for i in range(29, 21, -1)]
    assert entry["gains"][0][1:] == [14.5, "a/29-0.png", "b/29-0.png"]
    assert [row[0] for row in entry["losses"]] == [f"prompt {i}" for i in range(8)]
    lower = compared(a, Group("b", (b,)), replace(MEASURE, higher_is_better=False), found)
    assert [row[0] for row in lower["gains"]] == [row[0] for row in entry["losses"]]


def test_images_without_a_score_and_prompts_that_a_training_seed_lacks_are_left_out():
    a, first, second = side("a"), side("b1"), side("b2", prompts=PROMPTS[:20])
    found = scores(a, first, second)
    found["b1", "taste"][:2] = np.nan  # both images of the first prompt
    rows = table(a, Group("b", (first, second)), MEASURE, found)
    assert len(rows.prompts) == 19 and len(rows.a) == 2 * 19 * 2 and set(rows.training) == {0, 1}
    entry = compared(a, Group("b", (first, second)), MEASURE, found)
    assert entry["paired"]["training_seeds"] == 2 and entry["worth"]["limit"] == 2
    assert compared(a, Group("b", (first,)), MEASURE, found | {("b1", "taste"): np.full(60, np.nan)}) is None


def test_p_is_adjusted_over_all_comparisons():
    a, b = side("a"), side("b")
    entries = [compared(a, Group("b", (b,)), MEASURE, scores(a, b, shift=s)) for s in (0.0, 1.0, 2.0)]
    adjusted(entries)
    assert [entry["p"] for entry in entries] == compare.holm([entry["paired"]["p_sign"] for entry in entries])
    assert entries[1]["p"] > entries[1]["paired"]["p_sign"]


@pytest.mark.parametrize(("signs", "line"), [((1, -1), "scorers disagree on b"), ((1, 1), None)])
def test_scorers_that_disagree_are_said(signs, line):
    a, b = side("a"), side("b")
    entries = []
    for name, sign in zip(("taste", "other"), signs, strict=True):
        found = scores(a, b, shift=2.0 * sign)
        entries.append(
            compared(a, Group("b", (b,)), replace(MEASURE, name=name), {(s, name): v for (s, _), v in found.items()})
        )
    adjusted(entries)
    said = cautions(entries, [])
    assert [line in words for words in said] == [True] if line else said == []

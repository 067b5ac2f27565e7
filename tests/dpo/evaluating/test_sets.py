"""A number for all images of a side: whatever their order, compared prompt by prompt, and what cannot be is said."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.common.errors import UserError
from dpo.evaluating.result import Measure
from dpo.evaluating.sets import Found, difference, entries, of_side
from dpo.evaluating.sides import Shown, Side
from dpo.scorers.compare import mean_interval
from dpo.scorers.diversity import Diversity
from dpo.scorers.inception import inception_score

DIVERSITY = Diversity(lambda images: torch.empty(0), "d")


@dataclass
class Whole:
    """An Inception Score of given logits: a number with an interval that is no mean over prompts."""

    name: str = "whole"
    fingerprint: str = "whole 1"

    def features(self, *, images):
        raise AssertionError

    def score(self, features, prompts):
        return inception_score(features)


def side(name, prompts=30, seeds=3):
    shown = [Shown(Path(f"{name}/{i}-{s}.png"), f"prompt {i}", s) for i in range(prompts) for s in range(seeds)]
    return Side(name, Path(name), tuple(shown))


def seen(one, scorer, spread=1.0, seed=0):
    """What a scorer says of a side whose images of a prompt lie `spread` apart."""
    rng = np.random.default_rng(seed)
    middle = {prompt: rng.normal(size=8) for prompt in sorted({image.prompt for image in one.images})}
    rows = np.array([middle[image.prompt] + spread * rng.normal(size=8) for image in one.images], np.float32)
    return of_side(one, rows, hashes(one), scorer), rows


def hashes(one):
    return {image.path: f"{image.path.name}" for image in one.images}


@pytest.mark.parametrize("scorer", [DIVERSITY, Whole()], ids=lambda scorer: scorer.name)
def test_the_order_of_the_files_plays_no_part_and_a_side_is_like_itself(scorer):
    one = side("a")
    found, rows = seen(one, scorer)
    order = np.random.default_rng(5).permutation(len(rows))
    again = of_side(replace(one, images=tuple(one.images[i] for i in order)), rows[order], hashes(one), scorer)
    assert again == found and difference(found, again)[0] == 0.0
    low, high = difference(found, again)[1]
    assert low <= 0 <= high


def test_a_mean_over_prompts_is_compared_prompt_by_prompt():
    a, b = seen(side("a"), DIVERSITY)[0], seen(side("b"), DIVERSITY, spread=0.8, seed=1)[0]
    gaps = np.array([b.by_prompt[prompt] - a.by_prompt[prompt] for prompt in sorted(a.by_prompt)])
    assert difference(a, b) == (pytest.approx(gaps.mean()), mean_interval(gaps))
    assert difference(a, b)[0] == pytest.approx(b.value - a.value) == -difference(b, a)[0]
    some = seen(side("b", prompts=12), DIVERSITY)[0]
    assert difference(a, some)[0] == pytest.approx(
        np.mean([some.by_prompt[prompt] - a.by_prompt[prompt] for prompt in some.by_prompt])
    )
    assert difference(a, seen(side("c", prompts=1), DIVERSITY)[0])[1] is None, "one prompt has no interval"


def test_of_other_numbers_the_errors_are_independent_and_sets_of_two_sizes_are_not_compared():
    a, b = Found(10.0, (9.7, 10.3), 50, None), Found(8.0, (7.6, 8.4), 50, None)
    assert difference(a, b) == (-2.0, (pytest.approx(-2.5), pytest.approx(-1.5)))
    assert difference(a, replace(b, interval=None)) == (-2.0, None)
    assert difference(a, replace(b, images=49)) is None


def test_images_without_features_are_left_out():
    one = side("a")
    found, rows = seen(one, DIVERSITY)
    rows[:3] = np.nan
    less = of_side(one, rows, hashes(one), DIVERSITY)
    assert less.images == 87 and less.by_prompt.keys() == found.by_prompt.keys() - {"prompt 0"}
    for none in (np.full_like(rows, np.nan), rows[:, :0]):
        with pytest.raises(UserError, match="diversity can use no image of a"):
            of_side(one, none, {}, DIVERSITY)
    endless = Whole()
    endless.score = lambda features, prompts: (float("inf"), None)
    with pytest.raises(UserError, match="whole gave no finite number to the images of a"):
        of_side(one, rows, hashes(one), endless)


def test_the_entries_have_the_base_first_and_say_what_fell():
    found = {
        name: seen(side(name), DIVERSITY, spread, seed)[0]
        for name, spread, seed in (("start", 1.0, 0), ("dpo", 0.3, 1), ("wild", 3.0, 2))
    }
    made, lines = entries(Measure("diversity", "d"), "start", found)
    assert [entry["side"] for entry in made] == ["start", "dpo", "wild"]
    assert made[0]["difference"] is made[0]["difference_interval"] is None
    assert made[1]["difference"] < 0 < made[2]["difference"] and made[0]["images"] == 90
    assert len(lines) == 1 and lines[0].startswith("diversity falls: dpo has 0.") and "against start (95 %" in lines[0]
    _, lines = entries(Measure("fid", "f", higher_is_better=False), "start", found)
    assert len(lines) == 1 and lines[0].startswith("fid rises: wild has ")


def test_what_cannot_be_compared_is_said():
    found = {"start": Found(10.0, (9.7, 10.3), 50, None), "dpo": Found(8.0, (7.6, 8.4), 49, None)}
    made, lines = entries(Measure("whole", "w"), "start", found)
    assert made[1]["difference"] is None and lines == [
        "whole saw 50 images of start and 49 of dpo, which cannot be compared: draw both alike"
    ]
    made, lines = entries(Measure("whole", "w"), "start", {"dpo": found["dpo"]})
    assert made[0]["value"] == 8.0 and made[0]["difference"] is None and lines == []

"""Strengths from matches: the order that wins say, finite for one that never lost, and only where somebody compared."""

from collections import Counter

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.pairing.choose import Rule, preferred
from dpo.pairing.matches import Match, ranking, strengths


def test_strengths_are_the_likeliest_with_one_unseen_tie_each():
    wins = np.array([[0, 3, 2, 0.5], [1, 0, 2, 4], [0, 0, 0, 1], [0.5, 0, 0, 0]], dtype=np.float64)
    theta = strengths(wins)
    better = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))  # of the row over the column
    over_unseen = 1 / (1 + np.exp(-theta))
    slope = (wins * (1 - better)).sum(1) - (wins.T * better).sum(1) + 0.5 * (1 - over_unseen) - 0.5 * over_unseen
    assert np.abs(slope).max() < 1e-5 < np.abs(theta).min(), "the likelihood, which is concave, is flat there"


def rated(tmp_path, *matches, prompt="x", group=None):
    for name in "abcdefgh":
        (tmp_path / name).touch()
    counts = Counter()
    found = ranking(
        [
            Match(f"line {i}", tmp_path / a, tmp_path / b, tie, prompt, group)
            for i, (a, b, tie) in enumerate(matches, 2)
        ],
        counts,
    )
    return {image.name: value for image, value in zip(found.images, found.values, strict=True)}, found


def test_a_tournament_orders_its_images(tmp_path):
    values, found = rated(tmp_path, ("a", "b", False), ("b", "c", False), ("a", "c", False), ("c", "d", True))
    assert values["a"] > values["b"] > values["c"] and np.isfinite(list(values.values())).all()
    assert found.direction == "chosen is the one with the higher strength" and found.groups == ["x"]
    values, _ = rated(tmp_path, ("a", "b", True), ("a", "c", False), ("b", "c", False))
    assert values["a"] == values["b"] > values["c"], "equal results are a tie, to the bit"


def test_images_that_met_and_drew_are_a_tie_whatever_others_say_of_them(tmp_path):
    """Of c and d the strengths differ by their other matches alone; a and b won one each, b and c were not compared."""
    _, found = rated(
        tmp_path,
        ("a", "b", False),
        ("b", "a", False),
        ("a", "c", False),
        ("c", "d", True),
        ("e", "f", True),
        ("f", "e", False),
    )
    names = [image.name for image in found.images]
    assert [{names[a], names[b]} for a, b in sorted(found.even)] == [{"a", "b"}, {"c", "d"}]
    made = preferred(found.groups, found.group, found.scores, str, Rule(), found.even)
    pairs = [{names[a], names[b]} for a, b in made.pairs]
    assert {"c", "d"} not in pairs and {"a", "b"} not in pairs and {"a", "c"} in pairs and {"e", "f"} in pairs
    assert made.ties == 2 and len(pairs) == 5


def test_images_that_nobody_compared_are_in_different_groups(tmp_path):
    _, found = rated(tmp_path, ("a", "b", False), ("c", "d", False), ("d", "e", False))
    assert found.groups == ["x (part 1)", "x (part 2)"] and found.prompts == ["x", "x"]
    assert found.group.tolist() == [0, 0, 1, 1, 1]


def test_matches_without_a_prompt_or_with_oneself(tmp_path):
    assert rated(tmp_path, ("a", "b", False), prompt="")[1].counts["without a prompt"] == 1
    with pytest.raises(UserError, match="line 2: an image is matched with itself"):
        rated(tmp_path, ("a", "a", False))


def test_a_group_whose_matches_have_two_prompts_is_refused(tmp_path):
    """One of the two would get the images of the other."""
    for name in "abc":
        (tmp_path / name).touch()

    def played(*prompts):
        places = [(tmp_path / one, tmp_path / other) for one, other in ("ab", "bc", "ac")]
        rows = zip(places, prompts, strict=True)
        return [Match(f"line {i}", *place, False, prompt, "7") for i, (place, prompt) in enumerate(rows, 2)]

    with pytest.raises(UserError, match="line 4: group '7' has two prompts, 'a fox' and 'a boat'"):
        ranking(played("a fox", "", "a boat"), Counter())
    assert ranking(played("", "a fox", "a fox"), Counter()).prompts == ["a fox"]

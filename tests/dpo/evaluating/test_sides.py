"""Which image of one side belongs to which of the other, and when two sides may be compared at all."""

from pathlib import Path

import pytest

from dpo.common.errors import UserError
from dpo.evaluating.sides import Shown, Side, check_protocols, matched


def side(name, *images, protocol=None):
    """Images as (prompt, seed); their files are numbered."""
    shown = tuple(Shown(Path(f"{name}/{i}.png"), *image) for i, image in enumerate(images))
    return Side(name, Path(name), shown, protocol)


def partners(a, b):
    found = matched(a, b)
    return [
        (found.prompts[p], a.images[i].path.name, b.images[j].path.name)
        for p, i, j in zip(found.prompt, found.a, found.b, strict=True)
    ]


def test_by_prompt_and_seed_whatever_the_order():
    a, b = side("a", ("fox", 1), ("fox", 2), ("cat", 1)), side("b", ("cat", 1), ("fox", 2), ("fox", 1))
    assert partners(a, b) == [("fox", "0.png", "2.png"), ("fox", "1.png", "1.png"), ("cat", "2.png", "0.png")]
    assert matched(a, b).by_seed and matched(a, b).left_out == (0, 0)


def test_by_prompt_in_order_where_a_seed_is_not_known():
    a, b = side("a", ("fox", 1), ("fox", 2), ("cat", 1)), side("b", ("fox", None), ("dog", None), ("cat", 7))
    found = matched(a, b)
    assert not found.by_seed and found.left_out == (1, 1)
    assert partners(a, b) == [("fox", "0.png", "0.png"), ("cat", "2.png", "2.png")]


def test_an_image_that_is_there_twice_keeps_its_partner():
    a, b = side("a", ("fox", 1), ("fox", 1)), side("b", ("fox", 1))
    assert partners(a, b) == [("fox", "0.png", "0.png")] and matched(a, b).left_out == (1, 0)


def test_nothing_in_common_is_refused():
    with pytest.raises(UserError, match="no prompt with the same seed in common"):
        matched(side("a", ("fox", 1)), side("b", ("fox", 2)))
    with pytest.raises(UserError, match=r"a \(a\) and b \(b\) have no prompt in common"):
        matched(side("a", ("fox", None)), side("b", ("cat", None)))


def test_another_protocol_is_refused_by_its_field():
    a = side("a", ("fox", 1), protocol={"steps": 20, "guidance": 5.0, "model": "x"})
    b = side("b", ("fox", 1), protocol={"steps": 50, "guidance": 5.0, "model": "y"})
    with pytest.raises(UserError, match=r"different protocols \(steps: 20 and 50\)"):
        check_protocols([a, b], may_differ=["model"])
    with pytest.raises(UserError, match="model: 'x' and 'y'"):
        check_protocols([a, side("b", ("fox", 1), protocol={"steps": 20, "guidance": 5.0, "model": "y"})])
    assert check_protocols([a, b], may_differ=["model", "steps"]) == []


def test_an_unknown_protocol_is_said():
    a, b = side("a", ("fox", 1), protocol={"steps": 20}), side("midjourney", ("fox", None))
    assert len(check_protocols([a, b])) == 1 and "midjourney" in check_protocols([a, b])[0]
    assert check_protocols([a]) == []

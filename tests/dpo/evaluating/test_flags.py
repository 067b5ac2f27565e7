"""Words of a command line: sides, tables, scorers."""

from pathlib import Path

import pytest

from dpo.common.errors import UserError
from dpo.evaluating.flags import check_scorers, named, table


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [("a=runs/b", "a", "runs/b"), ("runs/b", "b", "runs/b"), ("owner/model", "model", "owner/model"), (" a = b ", "a", "b"), ("a=b=c", "a", "b=c")],
)  # fmt: skip
def test_a_side(text, name, place):
    assert named(text) == (name, place)


@pytest.mark.parametrize("text", ["", "=", "a=", "=b", " = "])
def test_a_side_without_a_name_or_a_place(text):
    with pytest.raises(UserError, match="expected a model or a folder"):
        named(text)


def test_a_table():
    assert table("a=b.csv") == ("a", Path("b.csv"))
    for text in ("a", "=b", "a="):
        with pytest.raises(UserError, match="expected NAME=TABLE"):
            table(text)


def test_scorers_are_looked_for_before_anything_is_done():
    check_scorers([])
    check_scorers(["tiny-a", "pickscore"])
    with pytest.raises(UserError, match="did you mean tiny-"):
        check_scorers(["tiny-a", "tiny-c"])

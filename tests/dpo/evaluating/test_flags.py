"""Words of a command line: sides, tables, scorers."""

from pathlib import Path

import pytest

from dpo.common.errors import UserError
from dpo.evaluating.flags import check_scorers, named, table


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("a=runs/b", "a", "runs/b"),
        ("runs/b", "b", "runs/b"),
        ("owner/model", "model", "owner/model"),
        (" a = b ", "a", "b"),
        ("a=b=c", "a", "b=c"),
        ("start:runs/b", "start of b", "start:runs/b"),
        ("s=start:b", "s", "start:b"),
    ],
)
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
    assert check_scorers([]) == [] and check_scorers([], ["theirs"]) == ["theirs"]
    assert check_scorers(["tiny-a", "tests.help.judges:Grey"], ["theirs"]) == ["theirs", "tiny-a", "grey"]
    with pytest.raises(UserError, match="pickscore: cannot get .* from the hub"):
        check_scorers(["tiny-a", "pickscore"])
    check_scorers(["tiny-a", "pickscore"], hub=False)
    with pytest.raises(UserError, match="^--evaluate tiny-c: there is no such scorer; did you mean tiny-"):
        check_scorers(["tiny-c"], flag="--evaluate")
    with pytest.raises(UserError, match="did you mean tiny-"):
        check_scorers(["tiny-a", "tiny-c"])


@pytest.mark.parametrize(
    ("names", "tables"),
    [(["tiny-b", "tiny-b"], []), (["tiny-b"], ["tiny-b"]), (["tiny-b", "tests.help.judges:Impostor"], [])],
)
def test_two_scorers_of_one_name_are_refused(names, tables):
    """Their numbers would stand under one name, one in place of the other."""
    with pytest.raises(UserError, match="its scores are called tiny-b, as those of "):
        check_scorers(names, tables)
    check_scorers(["tiny-a", "tiny-b", "tests.help.judges:Grey"], ["another"])

"""Names and keys: spelt one way, kept here, and guessed by nobody."""

import pytest

from dpo.common.errors import UserError
from dpo.voting.answers import Answer, Journal
from dpo.voting.raters import FILE, cleaned, invited, key_of, key_of_all


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("  Anna   Berg ", "Anna Berg"),
        ("A\u0308nne", "Änne"),
        ("x" * 60, "x" * 60),
        ("x" * 61, None),
        (" ", None),
        ("a\0b", None),
        ("a\x1b[31m", None),
        ("a\u202eb", None),
        ("half \ud800", None),
    ],
)
def test_a_name_is_spelt_one_way(name, clean):
    assert cleaned(name) == clean


def test_the_invited_are_kept_and_added_to(tmp_path):
    assert invited(tmp_path) == [] and not (tmp_path / FILE).exists()
    assert invited(tmp_path, ["Anna", "Ben", "anna"]) == ["Anna", "Ben"]
    assert invited(tmp_path, ["Cleo"]) == ["Anna", "Ben", "Cleo"] == invited(tmp_path)
    with pytest.raises(UserError, match="--raters ' ': a name has 1 to 60 characters"):
        invited(tmp_path, [" "])
    (tmp_path / FILE).write_text('{"a": 1}', "utf-8")
    with pytest.raises(UserError, match=r"raters\.json: cannot be read"):
        invited(tmp_path)


def test_who_has_voted_is_invited_by_the_name_of_the_votes(tmp_path):
    """Under another spelling the same person would be asked everything again, and count twice."""
    with Journal(tmp_path) as journal:
        journal.add(Answer("0" * 32, "anna", "item", "general", "first", 0, False, 2.0, "2026-01-01T00:00:00Z"))
    assert invited(tmp_path, ["Anna", "Ben"]) == ["anna", "Ben"] == invited(tmp_path, ["ANNA"])


def test_a_key_belongs_to_one_name_of_one_study():
    keys = {key_of(b"1", "Anna"), key_of(b"1", "Ben"), key_of(b"2", "Anna"), key_of_all(b"1"), key_of(b"1", "")}
    assert len(keys) == 5 and all(len(key) == 32 for key in keys)

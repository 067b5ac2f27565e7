"""study.json: what was declared comes back, and nothing that was changed since."""

import os
import stat

import pytest

from dpo.common.errors import UserError
from dpo.voting import study
from tests.help.votes import imagined


def test_a_study_comes_back_as_it_was_declared(tmp_path):
    declared = imagined(asked={"--votes": "3"}, note="said", rule=study.Rule(broken=0.5, repeats=0.25))
    assert not study.is_study(tmp_path)
    study.write(tmp_path, declared)
    assert study.is_study(tmp_path) and study.read(tmp_path) == declared


@pytest.mark.parametrize(
    ("was", "now"),
    [('"votes": 3', '"votes": 4'), ('"kind": "broken"', '"kind": "vote"'), ('"broken": 0.75', '"broken": 0.5')],
)
def test_a_changed_study_is_refused(tmp_path, was, now):
    path = study.write(tmp_path, imagined())
    text = path.read_text("utf-8")
    assert was in text
    path.write_text(text.replace(was, now), "utf-8")
    with pytest.raises(UserError, match=r"study\.json was changed after it was declared.*put it back"):
        study.read(tmp_path)


def test_what_is_no_study_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no study\.json: declare a study with python -m dpo\.vote A B --output"):
        study.read(tmp_path)
    for text in ("", "[]", "{}", '{"sha256": "x"', "[" * 100_000):
        (tmp_path / study.FILE).write_text(text, "utf-8")
        with pytest.raises(UserError, match=r"study\.json") as error:
            study.read(tmp_path)
        assert "\n" not in str(error.value)


def test_of_a_later_format_and_of_a_part_missing(tmp_path):
    study.write(tmp_path, imagined(format=2))
    with pytest.raises(UserError, match="format 2 is not known here"):
        study.read(tmp_path)
    from dpo.common.files import sealed

    (tmp_path / study.FILE).write_text(sealed({"format": 1, "items": []}, study.SEAL), "utf-8")
    with pytest.raises(UserError, match="lacks a part of a study: 'questions'"):
        study.read(tmp_path)


def test_the_secret_is_made_once_and_for_its_owner_alone(tmp_path):
    made = study.secret(tmp_path)
    assert len(made) == 32 and study.secret(tmp_path) == made
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / study.SECRET).stat().st_mode) == 0o600
    for text in ("no key", "", "00" * 31, "é"):
        (tmp_path / study.SECRET).write_text(text, "utf-8")
        with pytest.raises(UserError, match="delete it, and give the raters their links anew"):
            study.secret(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [study.SECRET]

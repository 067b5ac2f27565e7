"""answers.jsonl: one line each, on disk before anybody hears of it, and whole after a kill at any byte."""

import json
import logging
import os

import pytest

from dpo.common.errors import UserError
from dpo.voting import answers
from dpo.voting.answers import FILE, Answer, Journal, Undo, read


def answer(id="1", **fields):
    plain = {
        "rater": "Änne",
        "item": "i",
        "question": "q",
        "choice": "first",
        "left": 0,
        "repeat": False,
        "seconds": 1.5,
    }
    return Answer(**{"id": id, **plain, "at": "2026-01-01T00:00:00+00:00", **fields})


def write(folder, *lines):
    with Journal(folder) as journal:
        for line in lines:
            journal.add(line)


def test_an_id_counts_once_and_undone_ones_do_not(tmp_path):
    assert read(tmp_path) == []
    again = answer("1", choice="second")
    write(tmp_path, answer("1"), answer("2"), again, Undo("2", "Änne", "x"), answer("3", left=1, repeat=True))
    assert read(tmp_path) == [answer("1"), answer("3", left=1, repeat=True)]
    write(tmp_path, answer("2"))  # a resend that comes after the undo
    assert [one.id for one in read(tmp_path)] == ["1", "3"]


def test_nobody_takes_back_what_another_said(tmp_path):
    write(tmp_path, answer("1"), Undo("1", "Ben", "x"), Undo("7", "Ben", "x"))
    assert read(tmp_path) == [answer("1")]


@pytest.mark.long
def test_a_kill_at_any_byte_of_a_line_loses_no_earlier_line(tmp_path, caplog):
    write(tmp_path, answer("1"))
    whole = (tmp_path / FILE).read_bytes()
    write(tmp_path, answer("2"))
    both = (tmp_path / FILE).read_bytes()
    for size in range(len(whole), len(both)):
        (tmp_path / FILE).write_bytes(both[:size])
        expected = ["1"] if size < len(both) - 1 else ["1", "2"]  # all but the end of its line
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dpo"):
            assert [one.id for one in read(tmp_path)] == expected
        torn = len(whole) < size < len(both) - 1
        assert ("the last line is torn" in caplog.text) == torn
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dpo"):
            write(tmp_path, answer("3"))
        assert ("torn by a kill" in caplog.text) == torn
        assert [one.id for one in read(tmp_path)] == [*expected, "3"]
        assert all(json.loads(line) for line in (tmp_path / FILE).read_text("utf-8").splitlines())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "line 2.*cannot be read"),
        ("[]", "line 2.*no JSON object"),
        ("[" * 100_000, "line 2.*nested too deeply"),
        ('{"undo": "1"}', "line 2.*it needs undo, rater, at"),
        (json.dumps({**vars(answer("2")), "choice": "left"}), "choice is 'left'"),
        (json.dumps({**vars(answer("2")), "left": 2}), "left is 2"),
        (json.dumps({**vars(answer("2")), "left": True}), "left is True"),
        (json.dumps({**vars(answer("2")), "seconds": "1"}), "seconds is '1'"),
        (json.dumps({**vars(answer("2")), "more": 1}), "it needs id, rater"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, text, what):
    write(tmp_path, answer("1"))
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write(text + "\n" + json.dumps(vars(answer("3"))) + "\n")
    with pytest.raises(UserError, match=rf"answers\.jsonl, {what}" if what.startswith("line") else what):
        read(tmp_path)


def test_a_line_is_on_disk_before_add_returns(tmp_path, monkeypatch):
    events = []
    with Journal(tmp_path) as journal:
        write_, fsync = os.write, os.fsync
        monkeypatch.setattr(answers.os, "write", lambda file, data: events.append("write") or write_(file, data))
        monkeypatch.setattr(answers.os, "fsync", lambda file: events.append("fsync") or fsync(file))
        journal.add(answer("1"))
    assert events == ["write", "fsync"]


@pytest.mark.parametrize("cut_fails", [False, True])
def test_a_disk_that_fills_within_a_line_leaves_whole_lines(tmp_path, monkeypatch, cut_fails):
    with Journal(tmp_path) as journal:
        journal.add(answer("1"))
        real, cut = os.write, os.ftruncate

        def full(file, data):
            if len(data) < 40:
                raise OSError(28, "No space left on device")
            return real(file, data[: len(data) - 20])

        def refused(file, size):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(answers.os, "write", full)
        if cut_fails:
            monkeypatch.setattr(answers.os, "ftruncate", refused)
        with pytest.raises(UserError, match="the disk is full"):
            journal.add(answer("2"))
        monkeypatch.setattr(answers.os, "write", real)
        monkeypatch.setattr(answers.os, "ftruncate", cut)
        assert [line.id for line in journal.lines] == ["1"]
        journal.add(answer("3"))
    assert [one.id for one in read(tmp_path)] == ["1", "3"]
    assert len((tmp_path / FILE).read_text("utf-8").splitlines()) == 2

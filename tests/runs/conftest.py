"""Fixtures of the tests that run the command."""

import sys

import pytest

from dpo.training import summary
from tests.help.commands import SMALL, command

# Its process plays another machine wherever it is started: once, by tests.help.elsewhere, is enough.
collect_ignore = [] if sys.modules.get("triton", sys) is None else ["test_elsewhere.py"]


@pytest.fixture
def start(world, tmp_path):
    """The words of a valid command; flags that a test adds after them win."""
    return [
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--output",
        tmp_path / "out",
        *SMALL,
        "--batch-size",
        "2",
    ]


@pytest.fixture
def brief(monkeypatch):
    """Leaves out plots and report at the end of a run: they take a second, and other tests check them."""
    monkeypatch.setattr(summary, "report", lambda run, status, reason="": None)


@pytest.fixture
def stopped(start, tmp_path, capsys, brief):
    """A finished run of three updates with a checkpoint after each; the words of its command."""
    words = [*start, "--steps", "3", "--checkpoint-every", "1", "--checkpoints-limit", "0"]
    assert command(capsys, *words).code == 0
    return words

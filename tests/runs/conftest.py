"""Fixtures of the tests that run the command."""

import pytest

from dpo.training import summary
from tests.help.commands import SMALL, command


@pytest.fixture
def start(world, tmp_path):
    """The words of a command that is right in itself; those added to them win."""
    return ["--model", world("sd15"), "--data", world("pairs"), "--output", tmp_path / "out", *SMALL, "--batch-size", "2"]


@pytest.fixture
def brief(monkeypatch):
    """No plots and no report at the end: they are a second's work, and tested elsewhere."""
    monkeypatch.setattr(summary, "report", lambda run, status, reason="": None)


@pytest.fixture
def stopped(start, tmp_path, capsys, brief):
    """A run of three updates with a checkpoint after each; its words."""
    words = [*start, "--steps", "3", "--checkpoint-every", "1", "--checkpoints-limit", "0"]
    assert command(capsys, *words).code == 0
    return words

"""Fixtures of the tests that run the command."""

import sys

import pytest

from dpo import prepare
from dpo.training import summary
from tests.help.commands import SMALL, command
from tests.help.processes import commands, end, wait_for_updates

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


@pytest.fixture(scope="session")
def recorded_store(world, tmp_path_factory):
    """A store of the pairs with one recorded draw of its reference in float64, for --seed 3."""
    place = str(tmp_path_factory.mktemp("store") / "store")
    flags = ["--model", world("sd15"), "--data", world("pairs"), "--dtype", "fp32", "--workers", "0"]
    assert prepare.main(["--store", place, *flags, "--reference", "--precision", "fp64", "--seed", "3"]) == 0
    return place


@pytest.fixture
def launched(start, tmp_path):
    """A function that starts `start`, and more words, on two processes, and waits for as many updates as asked; their ids.

    Those that are left at the end are killed.
    """
    children: list[int] = []

    def launch(*words: object, until: int = 0, **more: str) -> list[int]:
        children[:] = commands(2, [str(word) for word in (*start, *words)], tmp_path, **more)
        wait_for_updates(tmp_path / "out", until)
        return children

    yield launch
    end(children)

"""dpo.common.locks: a second process is turned away, a dead one lets go, a file system without locks is said."""

import os
import platform

import pytest
from filelock import FileLock

from dpo.common import locks
from dpo.common.errors import UserError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.0)


def test_the_second_is_told_who_holds_it(tmp_path):
    with locks.held(tmp_path, "--output"):
        with pytest.raises(UserError) as caught, locks.held(tmp_path, "--output"):
            pass
        with locks.held(tmp_path, "--output", "-1-of-2"):  # another part of the folder
            pass
    said = str(caught.value)
    assert said.startswith(f"--output {tmp_path} is in use by process {os.getpid()} on {platform.node()} since 20")
    assert said.endswith("wait until that ends, or name another folder")


def test_it_is_let_go_after_an_error_too(tmp_path):
    with pytest.raises(ValueError, match="ours"), locks.held(tmp_path, "--output"):
        raise ValueError("ours")
    with locks.held(tmp_path, "--output"):
        pass
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [(".lock", 0)]


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path):
    with locks.held(tmp_path, "--store"):
        (tmp_path / ".lock.json").write_text("[")
        with pytest.raises(UserError, match="in use by another process"), locks.held(tmp_path, "--store"):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(self, timeout):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with locks.held(tmp_path, "--output"):
        pass
    assert "cannot be locked" in caplog.text and "start no second process" in caplog.text


def test_a_folder_that_another_process_takes_away_is_made_again(tmp_path, monkeypatch, caplog):
    """It had found the folder empty, just before the lock's file was made in it."""
    place, acquire, calls = tmp_path / "out", FileLock.acquire, []

    def late(self, *args, **options):
        calls.append(1)
        if len(calls) == 1:
            place.rmdir()
            raise FileNotFoundError(2, "No such file or directory")
        return acquire(self, *args, **options)

    place.mkdir()
    monkeypatch.setattr(FileLock, "acquire", late)
    with locks.held(place, "--output"):
        assert (place / locks.NAME).exists() and len(calls) == 2
    assert "cannot be locked" not in caplog.text


def test_a_folder_that_it_made_goes_while_nothing_is_in_it(tmp_path):
    place = tmp_path / "deep" / "out"
    with pytest.raises(UserError, match="refused"), locks.held(place, "--output"):
        assert (place / locks.NAME).exists()
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    with locks.held(place, "--output"):
        with locks.held(place, "--output", "-1-of-2"):  # another process is in it
            pass
        (place / "kept.txt").write_text("x")
    assert sorted(path.name for path in place.iterdir()) == [".lock", ".lock-1-of-2", "kept.txt"]
    with pytest.raises(UserError, match="refused"), locks.held(place, "--output"):
        raise UserError("refused")
    assert (place / "kept.txt").exists() and (place / locks.NAME).exists()

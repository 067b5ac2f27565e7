"""Whatever ends the updates leaves a checkpoint of the last whole one, and a resume ends where the run would have."""

import functools
import json
import logging
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
import torch

import dpo.train
from dpo.training import checkpoint, loop, results, samples, validation
from dpo.training.trackers import Trackers
from tests.help.commands import command

LAST = "checkpoints/step-00000004"
WORDS = ["--steps", "4", "--checkpoint-every", "0", "--log-every", "1"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Where the runs in one go are kept, by their flags."""
    return functools.cache(lambda flags: tmp_path_factory.mktemp("straight") / "out")


def check_like(path, wanted):
    """The tensors of two checkpoints are the same bits."""
    mine, other = checkpoint.load(path).tensors, checkpoint.load(wanted).tensors
    assert mine.keys() == other.keys() and {"policy", "optimizer", "tables"} <= mine.keys()
    for group, values in other.items():
        assert mine[group].keys() == values.keys()
        assert all(torch.equal(value, mine[group][name]) for name, value in values.items()), group


@pytest.fixture
def ended(start, tmp_path, capsys, brief, straight):
    """Ends a run by what `spoil` does to it; checks that what it leaves, and where asked what a resume makes of that, is
    bit for bit what one go gives."""

    def end(monkeypatch, spoil, kept: int, code: int = 1, flags=(), resumed: bool = True):
        words = [*start, *WORDS, *flags]
        with monkeypatch.context() as patch:
            spoil(patch)
            if code == 7:
                with pytest.raises(SystemExit) as left:
                    command(capsys, *words)
                assert left.value.code == 7
            else:
                said = command(capsys, *words)
                assert said.code == code and len(said.errors) == (code != 130), said
                assert bool(said.warnings(f"--output {tmp_path}/out --resume latest")) == (kept > 0)
        found = checkpoint.listing(tmp_path / "out" / "checkpoints")
        assert [path.name for path in found] == [f"step-{kept:08d}"] * (kept > 0)
        whole = straight(flags)
        if not whole.exists():
            every = ["--checkpoint-every", "1", "--checkpoints-limit", "0"]
            assert command(capsys, *words, "--output", whole, *every).code == 0
        for path in found:
            check_like(path, whole / "checkpoints" / path.name)
        if not resumed:
            return
        again = command(capsys, *words, "--resume", "latest")
        assert again.code == 0 and (kept == 0 or any(f"{kept} updates done" in line for line in again.log))
        check_like(tmp_path / "out" / LAST, whole / LAST)
        lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "event" not in line] == [1, 2, 3, 4]

    return end


def at_call(patch, where, name: str, error: BaseException, number: int, after: bool = False) -> None:
    """Call `number` (counted from 1) of `where.name` raises, before or after it did its work."""
    work, calls = getattr(where, name), []

    def spoiled(*args, **kwargs):
        calls.append(name)
        if len(calls) == number and not after:
            raise error
        value = work(*args, **kwargs)
        if len(calls) == number:
            raise error
        return value

    patch.setattr(where, name, spoiled)


ERRORS = {
    "worker": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2),
    "gpu": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2),
    "memory": (MemoryError(), 1),
    "exit": (SystemExit(7), 7),
    "fault": (RuntimeError("a fault of ours"), 1),
    "disk": (OSError(5, "Input/output error"), 1),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "resumed"])
def test_any_error_leaves_a_checkpoint(ended, monkeypatch, name, resumed):
    """Of the same bits whatever the error; the resume is made after faults in several places, below."""
    error, code = ERRORS[name]
    spoil = functools.partial(at_call, where=dpo.train, name="train_step", error=error, number=3)
    ended(monkeypatch, spoil, 2, code, resumed=resumed)


FAULT = RuntimeError("a fault of ours")
PLACES = {
    "in the middle of an update": (lambda patch: at_call(patch, torch.Tensor, "backward", FAULT, 3), 2, ()),
    "in the validation": (
        lambda patch: at_call(patch, validation, "differences", FAULT, 2),
        2,
        ("--validate-every", "1", "--validation-fraction", "0.1", "--validation-draws", "1"),
    ),
    "in the sample images": (lambda patch: at_call(patch, samples, "write", FAULT, 1), 2, ("--sample-every", "2")),
    "in a tracker": (lambda patch: at_call(patch, Trackers, "_scalars", FAULT, 3), 2, ()),
    "in the weights": (lambda patch: at_call(patch, torch.optim.AdamW, "step", FAULT, 3, after=True), 0, ()),
    "before the table": (
        lambda patch: at_call(patch, dpo.correction.CorrectionTable, "commit", FAULT, 3), 0, ("--method", "dde"),
    ),
    "before the figures are written": (lambda patch: at_call(patch, Trackers, "log", FAULT, 3), 0, ()),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("place", [pytest.param(x, marks=[pytest.mark.slow] * (n > 1)) for n, x in enumerate(PLACES)])
def test_an_error_anywhere_leaves_only_what_is_whole(ended, monkeypatch, place):
    spoil, kept, flags = PLACES[place]
    ended(monkeypatch, spoil, kept, flags=flags)


@pytest.mark.long
def test_workers_that_end_after_a_signal_to_the_group_are_a_stop(start, tmp_path, capsys, monkeypatch, brief):
    """They wait for the main process, which may be busy for longer, such as with sample images."""
    dead = RuntimeError("DataLoader worker (pid 7) is killed by signal: Alarm clock.")
    step = dpo.train.train_step

    def stopped(run, batches):
        if run.done == 2:
            signal.raise_signal(signal.SIGTERM)
            raise dead
        return step(run, batches)

    monkeypatch.setattr(dpo.train, "train_step", stopped)
    said = command(capsys, *start, *WORDS)
    assert said.code == 130 and not said.errors and said.warnings("go on with")
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "interrupted"
    assert checkpoint.find(tmp_path / "out" / "checkpoints", "latest").state["step"] == 2


@pytest.mark.long
def test_an_output_folder_that_is_moved_away_is_one_line_and_none_is_made(start, tmp_path, capsys, monkeypatch, brief):
    step = dpo.train.train_step

    def moved(run, batches):
        if run.done == 2:
            run.output.rename(tmp_path / "elsewhere")
        return step(run, batches)

    monkeypatch.setattr(dpo.train, "train_step", moved)
    said = command(capsys, *start, *WORDS, "--checkpoint-every", "1")
    assert said.code == 2 and "is gone: it was moved or deleted" in said.errors[0] and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert command(capsys, "--output", tmp_path / "elsewhere", "--resume", "latest").code == 0


@pytest.mark.long
def test_half_an_update_names_the_checkpoint_before(start, tmp_path, capsys, monkeypatch, brief):
    at_call(monkeypatch, torch.optim.AdamW, "step", FAULT, 3, after=True)
    said = command(capsys, *start, *WORDS, "--checkpoint-every", "1")
    assert said.code == 1 and said.warnings("the state is between two updates")
    assert said.warnings("the last checkpoint is") and said.warnings("step-00000002") and said.warnings("--resume lat")
    assert checkpoint.find(tmp_path / "out" / "checkpoints", "latest").state["step"] == 2


def test_a_checkpoint_that_cannot_be_written_hides_no_error(start, tmp_path, capsys, monkeypatch, brief):
    at_call(monkeypatch, dpo.train, "train_step", FAULT, 3)
    at_call(monkeypatch, checkpoint, "save_file", OSError(28, "No space left on device"), 1)
    said = command(capsys, *start, *WORDS)
    assert said.code == 1 and "a fault of ours" in said.errors[0]
    assert len(said.warnings("no checkpoint can be written (the disk is full")) == 1
    assert said.warnings("no checkpoint to go on from")


@pytest.mark.long
@pytest.mark.parametrize("name", ["write", "summary"])
def test_an_error_after_the_updates_names_how_to_finish(start, tmp_path, capsys, monkeypatch, brief, name):
    where, what = {"write": (results, "write"), "summary": (loop.summary, "report")}[name]
    with monkeypatch.context() as patch:
        at_call(patch, where, what, FAULT, 1)
        said = command(capsys, *start, *WORDS)
    assert said.code == 1 and said.warnings("update 4, the last, is made and kept") and said.warnings("--resume latest")
    assert command(capsys, *start, *WORDS, "--resume", "latest").code == 0
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.long
def test_a_result_that_a_stopped_resume_has_left_is_told_where_it_is_used(start, tmp_path, capsys, monkeypatch):
    from dpo.sampling.model import check

    out, step = tmp_path / "out", dpo.train.train_step
    assert command(capsys, *start, *WORDS, "--steps", "1").code == 0
    check(str(out))
    before = (out / "summary.json").read_bytes()

    def stopped(run, batches):
        if run.done == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(run, batches)

    monkeypatch.setattr(dpo.train, "train_step", stopped)
    assert command(capsys, *start, *WORDS, "--steps", "40", "--resume", "latest").code == 130
    monkeypatch.undo()
    said = []
    monkeypatch.setattr(logging.getLogger("dpo"), "warning", lambda text, *words: said.append(text % words))
    check(str(out)), check(str(out))
    (out / "summary.json").write_bytes(before)  # as after kill -9
    check(str(out))
    assert [line.partition(":")[0] for line in said] == [
        f"{out} stands at update 2 of 40, interrupted; its result is that of update 1",
        f"{out} stands at update 2 of 40; its result is that of update 1",
    ]


@pytest.mark.slow
def test_a_closed_terminal_is_a_stop_with_a_checkpoint(start, tmp_path, capsys):
    """The real one: the process leads the session of a terminal whose other end goes away; its workers hear of it too."""
    words = [str(word) for word in [*start, *WORDS, "--steps", "100000", "--workers", "1"]]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    try:
        while not (metrics.is_file() and '"loss"' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            try:
                os.read(ours, 1 << 16)
            except BlockingIOError:
                time.sleep(0.05)
        os.close(ours)
        assert process.wait(60) == 130
    finally:
        process.kill()
    (kept,) = checkpoint.listing(tmp_path / "out" / "checkpoints")
    assert checkpoint.load(kept).state["step"] > 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines[-1]["event"] == "interrupted"
    steps = [line["step"] for line in lines if "event" not in line]
    assert steps == list(range(1, lines[-1]["step"] + 1))


TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from dpo.train import main
code = main(sys.argv[1:])
os._exit(code)
"""


@pytest.mark.long
def test_a_killed_worker_leaves_a_checkpoint(start, tmp_path, capsys, monkeypatch, brief):
    """As the system's out-of-memory killer does it."""
    work = dpo.train.train_step

    def killing(run, batches):
        if run.done == 2:
            time.sleep(0.5)  # it has read ahead and waits: killed inside torch's lock it would take that with it
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.2)
        return work(run, batches)

    monkeypatch.setattr(dpo.train, "train_step", killing)
    said = command(capsys, *start, *WORDS, "--workers", "1", "--steps", "40")
    assert said.code == 2 and len(said.errors) == 1 and "a data worker died" in said.errors[0]
    assert said.warnings("--resume latest")
    assert checkpoint.find(tmp_path / "out" / "checkpoints", "latest").state["step"] >= 2

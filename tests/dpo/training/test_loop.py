"""dpo.training.loop: what is done around the updates and when, signals, and which errors a person sees."""

import errno
import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from dpo.common.errors import Stopped, UserError
from dpo.settings.config import Config, change
from dpo.training import checkpoint, loop
from dpo.training.run import Diverged
from dpo.training.trackers import open_trackers
from tests.help.running import make_run


def figures(pairs: int = 2) -> dict:
    return {"loss": 0.6, "pairs": pairs}


@pytest.fixture
def run(world, tmp_path):
    flags = [
        "--batch-size",
        "2",
        "--steps",
        "4",
        "--checkpoint-every",
        "2",
        "--checkpoints-limit",
        "0",
        "--log-every",
        "2",
    ]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    run.output.mkdir()
    return run


def test_updates_are_counted_logged_and_kept(run):
    seen = []

    def step(run, batches):
        seen.append([batch.position for batch in batches])
        return figures()

    trackers = open_trackers(run.output)
    loop.updates(run, trackers, step, threading.Event())
    trackers.close()
    assert seen == [[0], [2], [4], [6]] and (run.done, run.position) == (4, 8)
    assert [path.name for path in checkpoint.listing(run.checkpoints)] == ["step-00000002", "step-00000004"]
    lines = (run.output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(
        name in lines[0] for name in ("pairs_per_s", "learning_rate", "tflops", "peak_memory_gib", "wait_share")
    )


def test_a_signal_stops_between_micro_batches_with_a_checkpoint(run):
    def step(run, batches):
        if run.done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return figures(len(list(batches)))

    trackers = open_trackers(run.output)
    with pytest.raises(Stopped), loop.stop_on_signals() as stop:
        loop.updates(run, trackers, step, stop)
    trackers.close()
    assert run.done == 1 and [path.name for path in checkpoint.listing(run.checkpoints)] == ["step-00000001"]
    assert '"interrupted"' in (run.output / "metrics.jsonl").read_text()


@pytest.mark.long
@pytest.mark.parametrize(("error", "latest"), [(Diverged("not finite"), 2), (UserError("a bad image"), 3)])
def test_an_emergency_deletes_no_checkpoint(run, error, latest):
    """After a divergence the last healthy one goes on, where there is one; a mistake of a file leaves nothing poisoned."""
    run.config = change(run.config, checkpoints_limit=1)

    def step(run, batches):
        if run.done == 3:
            raise error
        return figures()

    trackers = open_trackers(run.output)
    with pytest.raises(type(error)):
        loop.updates(run, trackers, step, threading.Event())
    trackers.close()
    assert [path.name for path in checkpoint.listing(run.checkpoints)] == ["step-00000002", "step-00000003"]
    assert checkpoint.find(run.checkpoints, "latest").state["step"] == latest


@pytest.mark.long
def test_a_divergence_right_after_a_checkpoint_leaves_it_healthy(run):
    def step(run, batches):
        if run.done == 2:
            raise Diverged("not finite")
        return figures()

    trackers = open_trackers(run.output)
    with pytest.raises(Diverged):
        loop.updates(run, trackers, step, threading.Event())
    trackers.close()
    assert "diverged" not in checkpoint.find(run.checkpoints, "latest").state


def test_whole_weights_of_a_sharded_run_are_let_go_of_after_an_error_too():
    shards = SimpleNamespace(whole=lambda values: [("weight", value) for value in values])
    updater = SimpleNamespace(shards=shards, ema=[], parameters=[torch.ones(2)])
    run = SimpleNamespace(updater=updater, whole_weights=None)
    with pytest.raises(UserError), loop.whole(run):
        assert list(run.whole_weights) == ["weight"]
        raise UserError("the disk is full")
    assert run.whole_weights is None


@pytest.fixture
def foreground():
    """SIGINT interrupts, as on a terminal; a shell's background job, in which tests may run, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_does_not_wait(foreground):
    with pytest.raises(KeyboardInterrupt), loop.stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, *loop.ENDS])
def test_a_signal_that_is_ignored_stays_ignored(number):
    """nohup ignores SIGHUP, a shell the SIGINT of a job behind `&`: that of the foreground must not end it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with loop.stop_on_signals() as stop:
            signal.raise_signal(number)
            assert not stop.is_set()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_nothing_trained_is_said(run):
    trackers = open_trackers(run.output)
    with pytest.raises(UserError, match="no pair could be used, nothing was trained"):
        loop.updates(run, trackers, lambda run, batches: figures(0), threading.Event())
    trackers.close()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (Stopped(), 130, ""),
        (KeyboardInterrupt(), 130, "stopped at once; --resume latest"),
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, "lower --batch-size"),
        (OSError(28, "No space left on device"), UserError, "disk is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), UserError, "a data worker died"),
        (RuntimeError("a fault of ours"), RuntimeError, "a fault of ours"),
    ],
)
def test_how_a_run_ends(tmp_path, monkeypatch, caplog, raised, code, said):
    def fail(*_):
        raise raised

    monkeypatch.setattr(loop, "_train", fail)
    config = change(Config(), output=str(tmp_path))
    with caplog.at_level(logging.WARNING, "dpo"):
        if isinstance(code, int):
            assert loop.train(config, [], fail, fail) == code and said in caplog.text
        else:
            with pytest.raises(code, match=said):
                loop.train(config, [], fail, fail)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("elsewhere.csv", errno.EACCES, "elsewhere.csv: Permission denied"), ("out/unet", errno.EACCES, "cannot write")],
)
def test_an_unreadable_file_is_no_error_of_writing(tmp_path, monkeypatch, name, code, said):
    def failing(*args):
        raise PermissionError(code, "Permission denied", str(tmp_path / name))

    monkeypatch.setattr(loop, "_train", failing)
    with pytest.raises(UserError, match=said):
        loop.train(change(Config(), output=str(tmp_path / "out")), [], None, None)

"""Several processes of one run, as torchrun starts them, but forked: they begin in a moment, with everything imported."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dpo.training import parallel
from tests.help.children import start, start_command


def surroundings(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of one of `count` processes on this machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def together(count: int, work: Callable[[parallel.Processes], Any], folder: Path) -> list[Any]:
    """What `work` returns in each of `count` processes (as torch saves it); fails where one of them does."""
    port = free_port()

    def one(rank: int) -> None:
        os.environ.update(surroundings(rank, count, port))
        try:
            with parallel.opened() as processes:
                torch.save(work(processes), folder / f"{count}-{rank}.pt")
                processes.leave()
        except BaseException:
            traceback.print_exc()
            raise

    children = [start(lambda rank=rank: one(rank)) for rank in range(count)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * count, codes
    return [torch.load(folder / f"{count}-{rank}.pt", weights_only=True) for rank in range(count)]


def commands(count: int, words: list[str], folder: Path, **more: str) -> list[int]:
    """Starts `python -m dpo.train words...` as `count` processes; their ids. said-RANK gets what each writes.

    more: further names for their environment.
    """
    port, children = free_port(), []
    for rank in range(count):
        before = dict(os.environ)
        os.environ.update(surroundings(rank, count, port) | more)
        try:
            children.append(start_command(words, folder / f"said-{rank}"))
        finally:
            os.environ.clear()
            os.environ.update(before)
    return children


def codes(children: list[int]) -> list[int]:
    """The exit codes of processes once all have ended; minus the signal's number for one that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def end(children: list[int]) -> None:
    """Kills those that still run."""
    for child in children:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def updates(output: Path) -> list[dict]:
    """The figures of the updates that a run has made so far, as its folder has them."""
    file = output / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return [record for record in found if "event" not in record]


def wait_for_updates(output: Path, count: int, seconds: float = 120) -> None:
    """Returns once a run has made `count` updates, or after `seconds`."""
    limit = time.monotonic() + seconds
    while len(updates(output)) < count and time.monotonic() < limit:
        time.sleep(0.02)


def close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two figures are the same, number by number; None stands for none."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(close(*both, tolerance) for both in zip(found, expected))
    if expected is None or found is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)

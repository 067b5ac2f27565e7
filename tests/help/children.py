"""Forked children for tests of kills and memory: they start in a moment, with everything imported."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.train import main


def start(work: Callable[[], Any], write: int | None = None) -> int:
    """Forks a child that calls `work`, writes its result as JSON to the pipe `write` and ends; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        result = work()
        if write is not None:
            os.write(write, json.dumps(result).encode())
        code = 0
    finally:
        os._exit(code)


def start_command(words: list[str], said: Path, main: Callable[[list[str]], int] = main, *, fresh: bool = False) -> int:
    """Forks a child that is `python -m COMMAND words...` from there on; its process id.

    main: of the command, dpo.train unless said; `said` gets what it writes. fresh: in a new interpreter, which imports
    everything itself. Either hears Ctrl-C as from a terminal.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(said, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run behind `&` it is ignored
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", main.__module__, *words])
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        logging.getLogger("dpo").handlers.clear()
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(work: Callable[[], Any]) -> Any:
    """The result of `work`, called in a child process."""
    read, write = os.pipe()
    child = start(work, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def kill_until_done(work: Callable[[], Any], rng: random.Random, kills: int, longest: float) -> None:
    """Starts `work` again and again and kills it after up to `longest` seconds; after `kills` kills it may end."""
    for _ in range(kills):
        child = start(work)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitpid(start(work), 0)[1] == 0

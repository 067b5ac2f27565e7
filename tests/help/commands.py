"""The command itself in the test's own process: its exit code, what it wrote to stderr, what it left in a folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dpo.common import locks
from dpo.train import main

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) ")


SMALL = (
    "--workers",
    "0",
    "--validate-every",
    "0",
    "--sample-steps",
    "1",
    "--sample-seeds",
    "0",
    "--sample-prompts",
    "a red fox",
)


class Said(NamedTuple):
    """How a command ended: `log` are its log lines, `errors` everything else on stderr."""

    code: int
    log: list[str]
    errors: list[str]

    def warnings(self, word: str) -> list[str]:
        """The warnings that contain `word`."""
        return [line for line in self.log if " WARNING " in line and word in line]


def quietly(main: Callable[[list[str]], int], capsys, *words: object) -> tuple[int, str]:
    """Runs a command's `main` in this process: its exit code and what it wrote to stderr. The logger is as before."""
    log = logging.getLogger("dpo")
    before = log.handlers[:], log.level, log.propagate
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    finally:
        log.handlers[:], log.level, log.propagate = before
    return code, capsys.readouterr().err


def command(capsys, *words: object) -> Said:
    """Runs `python -m dpo.train words...` in this process, and restores the logger afterwards."""
    code, wrote = quietly(main, capsys, *words)
    lines = [line for line in wrote.splitlines() if line.strip()]
    logged = [line for line in lines if LOG_LINE.match(line)]
    return Said(code, logged, [line for line in lines if line not in logged])


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder with the size of its file; the empty file of a lock, which stays, is left out."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else -1
        for path in sorted(folder.rglob("*"))
        if path.name != locks.NAME
    }


def check_refused(said, words):
    assert said.code == 2
    assert len(said.errors) == 1, said.errors
    assert said.errors[0].startswith("dpo.train: ")
    assert [word for word in words if word not in said.errors[0]] == [], said.errors[0]

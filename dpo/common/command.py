"""The main of every command: what a mistake and an interruption look like, and the exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dpo.common.errors import Elsewhere, UserError
from dpo.common.libraries import misfit
from dpo.common.words import excerpt, first_line, is_plain, printable

FAULT = 1
MISTAKE = 2
INTERRUPTED = 130  # as a shell says of a process that Ctrl-C ended
GOES_ON = "stopped; the same command goes on from here"

log = logging.getLogger("dpo")


def run(name: str, work: Callable[[], int], stopped: str | None = None) -> int:
    """The exit code of a command: `work`'s own, 2 after a user's mistake (one line on stderr), 130 when interrupted.

    Anything unexpected gives 1 and one line too, which names a file with the traceback.

    A library that cannot be imported is a mistake of the installation, and costs one line too.

    When interrupted, the log says `stopped`; without it stderr says that the command was interrupted.
    """
    spin_less()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Windows console may lack a character of the log: no reason to end
    try:
        return work()
    except UserError as error:
        sys.stderr.write(f"{name}: {printable(str(error))}\n")
        return MISTAKE
    except Elsewhere as error:
        return error.code
    except Exception as error:
        if (line := misfit(error) or _too_long(error)) is None:
            sys.stderr.write(f"{name}: {printable(_unexpected(error))}\n")
            return FAULT
        sys.stderr.write(f"{name}: {printable(line)}\n")
        return MISTAKE
    except KeyboardInterrupt:
        if stopped is None:
            sys.stderr.write(f"{name}: interrupted\n")
        else:
            log.warning("%s", stopped)
        return INTERRUPTED


def spin_less() -> None:
    """Before torch is imported, which reads it: OpenMP threads that wait for work spin, but not long.

    Without spinning a run takes a third longer; spinning long starves a busy CPU. What the user set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _too_long(error: Exception) -> str | None:
    """One line on a name that no file can have, wherever it was first asked for; None for another error."""
    if getattr(error, "errno", None) != errno.ENAMETOOLONG:
        return None
    named = str(getattr(error, "filename", None) or "")
    return f"{excerpt(named)} is too long for the name of a file: name a shorter one"


def _unexpected(error: Exception) -> str:
    """One line on an error that nothing foresaw; its traceback goes to a new file, which the line names."""
    what = f"unexpected {type(error).__name__}: {first_line(error)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dpo-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as failed:  # a full disk may be the error itself
        return f"{what}; its traceback could not be kept ({first_line(failed)})"
    return f"{what}; please report it with its traceback, which is in {file.name}"


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError for a mistake, instead of printing its usage and exiting."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does it. Raises UserError for a word that no file could have as its name."""
        for word in sys.argv[1:] if args is None else args:
            if not is_plain(word):
                raise UserError(f"{word[:80]!a} has a character that no file or text has: it is not UTF-8, or NUL")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def in_words(argv: Sequence[str], *flags: str) -> list[str]:
    """The words of a command line, with FLAG=VALUE of these flags as the two that argparse takes it for."""
    found: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        found += [flag, value] if equals and flag in flags else [word]
    return found


def folder(text: str) -> str:
    """The type of a flag that names an output folder: an empty name would mean the folder one is in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("names no folder; a variable of the shell may be empty")
    return text


def of_launcher(name: str, default: int) -> int:
    """A number that torchrun puts into the environment. Raises UserError where something else stands there."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment has {name}={text[:80]}, which is no number: unset it, or start with torchrun")
    return int(text)


def shard_of(text: str | None) -> tuple[int, int]:
    """(process, number of processes) from "I/N", else from torchrun's environment. Raises UserError."""
    if text is None:
        return of_launcher("RANK", 0), of_launcher("WORLD_SIZE", 1)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N-1, such as 0/4")
    return int(found[1]), int(found[2])

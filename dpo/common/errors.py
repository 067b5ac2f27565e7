"""The exceptions for a user's mistake and for a request to stop."""

from __future__ import annotations

import csv
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from dpo.common.words import first_line

# What libraries raise for a file that is not what it should be. ValueError covers text, JSON, TOML and Arrow.
OF_READING = (
    OSError, ValueError, OverflowError, RecursionError, MemoryError, EOFError, csv.Error, tarfile.TarError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    Commands print it to stderr without a traceback and exit with code 2.
    """


class Stopped(Exception):
    """The user or the system asked the run to stop; the log has said what was kept and how to go on."""


class Elsewhere(Exception):
    """Another process of the same run ended it, and has said why: this one ends without a word."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code  # the exit code of all


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Around the reading of a user's file: what a library raises for its content becomes a UserError, "WHAT: ...; REMEDY".

    Mistakes that are already in words pass.
    """
    try:
        yield
    except OF_READING as error:
        raise UserError(f"{what}: cannot be read ({_reason(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return first_line(error)


class OutOfMemory(UserError):
    """The GPU's memory is full; `at_first`: in the first update of a start or before it, so that these settings do not fit."""

    def __init__(self, message: str, *, at_first: bool) -> None:
        super().__init__(message)
        self.at_first = at_first

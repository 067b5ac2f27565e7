"""The votes of a study: answers.jsonl, one line each, only ever added to.

    {"id", "rater", "item", "question", "choice", "left", "repeat", "seconds", "at"}      an answer
    {"undo": id, "rater", "at"}                                                           takes an answer back

A line is on disk before the rater hears that it counts. The last line may be torn by a kill, before anybody heard of it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from dpo.common.errors import reading
from dpo.common.files import AGAIN, sync_folder, writing
from dpo.common.words import excerpt

FILE = "answers.jsonl"
REMEDY = "mend that line or delete it"

Choice = Literal["first", "second", "tie"]
CHOICES: tuple[Choice, ...] = ("first", "second", "tie")
PLAIN = {"repeat": (bool,), "seconds": (int, float), "left": (int,)}  # of fields that are no text

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Answer:
    """What a rater said of an item."""

    id: str  # made by the page: a resend has the same
    rater: str
    item: str
    question: str  # its key
    choice: Choice  # of the item's images: where they stood is already taken out
    left: Literal[0, 1]  # which of the item's images stood on the left
    repeat: bool  # the second answer of this rater, with sides swapped: no vote
    seconds: float  # from both images shown to the answer
    at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Undo:
    """A rater takes an answer back."""

    undo: str  # the answer's id
    rater: str
    at: str


def read(folder: Path) -> list[Answer]:
    """The answers that stand, in the order they were given: an id counts once, undone ones are gone.

    A last line that a kill has torn is passed over, which is said. Raises UserError for another damaged line.
    """
    lines, torn, _ = _lines(folder / FILE)
    if torn:
        log.warning("%s: the last line is torn (%s) and does not count", folder / FILE, excerpt(torn))
    return standing(lines)


def standing(lines: Iterator[Answer | Undo] | list[Answer | Undo]) -> list[Answer]:
    """The answers among these lines that stand."""
    found: dict[str, Answer] = {}
    undone: set[str] = set()
    for line in lines:
        if isinstance(line, Undo):
            answer = found.get(line.undo)
            if answer is not None and answer.rater == line.rater:
                undone.add(line.undo)
        else:
            found.setdefault(line.id, line)
    return [answer for answer in found.values() if answer.id not in undone]


def _lines(path: Path) -> tuple[list[Answer | Undo], bytes, bool]:
    """The lines of a file, what is left of a torn last one, and whether the last line merely lacks its end.

    Raises UserError.
    """
    with reading(str(path), AGAIN):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return [], b"", False
    *whole, last = data.split(b"\n")
    found = []
    for number, line in enumerate(whole, 1):
        with reading(f"{path}, line {number}", REMEDY):
            found.append(_parsed(line))
    if last:
        # Whole but for the end of its line: an editor took that away, or a kill.
        with suppress(ValueError, RecursionError):
            return [*found, _parsed(last)], b"", True
    return found, last, False


def _parsed(line: bytes) -> Answer | Undo:
    """A line of the file. Raises ValueError."""
    content = json.loads(line.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    kind = Undo if "undo" in content else Answer
    names = [field.name for field in fields(kind)]
    if sorted(content) != sorted(names):
        raise ValueError(f"it needs {', '.join(names)}")
    for name, value in content.items():
        right = type(value) in PLAIN.get(name, (str,))
        if not right or (name == "choice" and value not in CHOICES) or (name == "left" and value not in (0, 1)):
            raise ValueError(f"{name} is {excerpt(value)}")
    return kind(**content)


class Journal:
    """answers.jsonl open for the one process that adds to it, as a context manager.

    lines: all that is there, undone and sent twice or not.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the file and mends a torn last line, which is said. Raises UserError."""
        self.path = folder / FILE
        self.lines, torn, endless = _lines(self.path)
        with writing(self.path, AGAIN):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            self._size = os.fstat(self._file).st_size
            if torn:
                log.warning(
                    "%s: the last line was torn by a kill (%s), nobody was told that it counts: taken out", self.path, excerpt(torn)
                )  # fmt: skip
                self._cut(self._size - len(torn))
            if endless:
                self._size += os.write(self._file, b"\n")
            sync_folder(folder)

    def add(self, line: Answer | Undo) -> None:
        """Adds a line: it is on disk when this returns. Raises UserError or OSError, and nothing was added then."""
        text = json.dumps(asdict(line), ensure_ascii=True, allow_nan=False) + "\n"
        data = text.encode()
        with writing(self.path, AGAIN):
            if os.fstat(self._file).st_size > self._size:
                self._cut(self._size)  # what a full disk left of a line, and let nobody take away then
            try:
                done = 0
                while done < len(data):
                    done += os.write(self._file, data[done:])
                os.fsync(self._file)
            except OSError:
                with suppress(OSError):
                    self._cut(self._size)
                raise
        self._size += len(data)
        self.lines.append(line)

    def _cut(self, size: int) -> None:
        """Takes away what is behind `size` bytes."""
        os.ftruncate(self._file, size)
        os.fsync(self._file)
        self._size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

"""What a section of the call for a GPU is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dpo.common.words import first_line

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A named piece of work that gives rows. limit: seconds, beyond which its process is ended. alone: in a fresh process."""

    name: str
    work: Callable[[], Iterable[Row]]
    limit: float = 60.0
    alone: bool = False


def said(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {first_line(error)}"

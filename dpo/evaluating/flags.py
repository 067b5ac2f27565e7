"""Words of a command line that name sides, scorers and tables. No torch until a scorer is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo.common.errors import UserError


class Named(NamedTuple):
    """A side as the command line gives it."""

    name: str
    place: str  # of a model or of images


def named(text: str) -> Named:
    """A side from "NAME=PLACE" or "PLACE", whose name is then its last part. Raises UserError."""
    name, equals, place = text.partition("=")
    if not equals:
        name, place = Path(text).name or text, text
    if not name.strip() or not place.strip():
        raise UserError(f"{text!r}: expected a model or a folder, or NAME=MODEL")
    return Named(name.strip(), place.strip())


def table(text: str) -> tuple[str, Path]:
    """(name, path) from "NAME=TABLE". Raises UserError."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise UserError(f"--scores {text}: expected NAME=TABLE, such as geneval=results.jsonl")
    return name, Path(path).expanduser()


def check_scorers(names: Sequence[str]) -> None:
    """Raises UserError for a scorer that there is not, or whose converted weights are not there; the hub is not asked."""
    if not names:
        return
    import torch

    from dpo.scorers.scorer import check

    for name in names:
        check(name, torch.device("cpu"))

"""Words of a command line that name sides, scorers and tables. No torch until a scorer is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo.common.errors import UserError
from dpo.common.files import is_there
from dpo.sampling.flags import START


class Named(NamedTuple):
    """A side as the command line gives it."""

    name: str
    place: str  # of a model or of images


class Method(NamedTuple):
    """One model, or several that differ in the seed they were trained with."""

    name: str
    seeds: tuple[Named, ...]


def named(text: str) -> Named:
    """A side from "NAME=PLACE" or "PLACE", whose name is then its last part. Raises UserError."""
    name, equals, place = text.partition("=")
    if not equals or is_there(text):
        name, place = Path(text.removeprefix(START)).name or text, text
        name = f"start of {name}" if text.startswith(START) else name
    if not name.strip() or not place.strip():
        raise UserError(f"{text!r}: expected a model or a folder, or NAME=MODEL")
    return Named(name.strip(), place.strip())


def table(text: str) -> tuple[str, Path]:
    """(name, path) from "NAME=TABLE". Raises UserError."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise UserError(f"--scores {text}: expected NAME=TABLE, such as geneval=results.jsonl")
    return name, Path(path).expanduser()


def check_scorers(
    names: Sequence[str],
    tables: Sequence[str] = (),
    *,
    flag: str = "--scorers",
    cache_dir: str | None = None,
    hub: bool = True,
) -> list[str]:
    """What all scores will be called, those of tables first.

    Raises UserError for scorers that there are not or cannot be had, and for two whose scores would have one name.
    tables: names of scores that come from tables; flag: by which the scorers were named; hub: whether weights are fetched
    from there too.
    """
    if not names:
        return list(tables)
    import torch

    from dpo.scorers.scorer import check, fetch

    seen = dict.fromkeys(tables, "--scores")
    for name in names:
        try:
            called = check(name, torch.device("cpu"))
            if hub:
                fetch(name, cache_dir)
        except UserError as error:
            said = str(error)
            raise UserError(flag + said.removeprefix("--scorers") if said.startswith("--scorers") else said) from error
        if called in seen:
            raise UserError(
                f"{flag} {name}: its scores are called {called}, as those of {seen[called]} are; name one of them"
            )
        seen[called] = name
    return list(seen)

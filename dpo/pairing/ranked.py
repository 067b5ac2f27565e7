"""Images with a number each, whatever they were read from: who is compared with whom, and what had to be left out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import as_on_windows, counted, excerpt, excerpt_of_path
from dpo.data.folders import BESIDE
from dpo.data.tables import in_utf8

log = logging.getLogger("dpo")

ROWS, NO_NUMBER, NO_PROMPT, NO_FILE = "rows", "without a number", "without a prompt", "without their file"
AGAIN, MATCHES = "rated again", "matches"  # names of counts; NO_... are of rows that are left out
COUNTED = ("stars", "points", "votes", "likes")  # numbers that one has more or fewer of


class Row(NamedTuple):
    """One image as somebody ranked it."""

    where: str  # a file and a line, for messages
    image: Path
    value: float  # finite
    prompt: str  # "" where nobody said
    group: str | None  # images are compared within it; None: within a prompt


@dataclass(frozen=True)
class Ranking:
    """M images that are compared within their groups."""

    named: str  # what the number is: "stars", "rank", "score", "strength"
    higher_is_better: bool
    images: list[Path]
    values: np.ndarray  # [M] float64, as they were given
    groups: list[str]  # [G] names
    group: np.ndarray  # [M] int64
    prompts: list[str]  # [G]
    counts: dict[str, int] = field(default_factory=dict)
    even: frozenset[tuple[int, int]] = frozenset()  # images a < b that were compared, and neither was better

    @property
    def scores(self) -> np.ndarray:
        """[M] float64, higher is better."""
        return self.values if self.higher_is_better else -self.values

    @property
    def direction(self) -> str:
        """Which image of a pair is the chosen one, in words."""
        if self.named in COUNTED:
            return f"chosen is the one with {'more' if self.higher_is_better else 'fewer'} {self.named}"
        return f"chosen is the one with the {'higher' if self.higher_is_better else 'lower'} {self.named}"


def gathered(named: str, higher_is_better: bool, rows: Iterable[Row], counts: Counter[str]) -> Ranking:
    """The ranking of some rows. An image that was rated more than once in a group has the mean of its numbers.

    Rows whose image is no file and, where prompts are what is compared within, rows without one are left out and counted
    in `counts`. Raises UserError where no image is there, and for a group with two prompts.
    """
    kept: dict[tuple[str, str], list[Row]] = {}
    gone: list[Row] = []
    for row in rows:
        if not os.path.isfile(row.image):
            gone.append(row)
            counts[NO_FILE] += 1
        elif row.group is None and not row.prompt:
            counts[NO_PROMPT] += 1
        else:
            group = row.prompt if row.group is None else row.group
            kept.setdefault((group, os.path.normpath(row.image)), []).append(row)
    if gone:
        first = f"{gone[0].where}: no such image file: {excerpt_of_path(str(gone[0].image))}{as_on_windows(str(gone[0].image))}"
        if not kept:
            raise UserError(f"{first} (paths are relative to the table's folder; --images FOLDER names another)")
        left = counted(len(gone), "image that is not there is", "images that are not there are")
        log.warning("%s; %s left out", first, left)
    counts[AGAIN] = sum(len(same) > 1 for same in kept.values())
    names = list(dict.fromkeys(group for group, _ in kept))
    number = {name: place for place, name in enumerate(names)}
    return Ranking(
        named,
        higher_is_better,
        [same[0].image for same in kept.values()],
        np.array([np.mean([row.value for row in same]) for same in kept.values()], dtype=np.float64),
        names,
        np.array([number[group] for group, _ in kept], dtype=np.int64),
        _prompts(names, [row for same in kept.values() for row in same]),
        dict(counts),
    )


def _prompts(names: list[str], rows: list[Row]) -> list[str]:
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for row in rows:
        found[row.prompt if row.group is None else row.group].append((row.where, row.prompt))
    return [prompt_of(name, said) for name, said in found.items()]


def prompt_of(group: str, said: Iterable[tuple[str, str]]) -> str:
    """The prompt of a group by what its lines (where, prompt) say; "" where none says one. Raises UserError for two."""
    found = ""
    for where, prompt in said:
        if prompt and found and prompt != found:
            raise UserError(
                f"{where}: group {excerpt(group)} has two prompts, {excerpt(found)} and {excerpt(prompt)}: "
                "both images of a pair have one prompt, so mend the table or leave the group's column out"
            )
        found = found or prompt
    return found


def beside(image: Path) -> str:
    """The caption in a text file beside an image; "" where there is none. Raises UserError where it is not UTF-8."""
    for suffix in (*BESIDE, *map(str.upper, BESIDE)):
        path = image.with_suffix(suffix)
        if path.is_file():
            with in_utf8(path):
                return " ".join(path.read_text(encoding="utf-8-sig").split())
    return ""

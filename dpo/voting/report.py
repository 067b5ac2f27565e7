"""The report of a study: votes.json, votes.md and votes.html in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Made(NamedTuple):
    """What a report wrote, and what it says in short."""

    page: Path
    lines: list[str]  # for the console


def make(folder: Path, *, scores: Sequence[str] = ()) -> Made:
    """Counts the votes of the study in `folder` and writes votes.json, votes.md and votes.html there.

    scores: what is compared with the people: folders of evaluations (with evaluation.json and scores.sqlite), or
    NAME=TABLE as dpo.evaluate takes it. Raises UserError where there is no study, no vote, or a table cannot be read.
    """
    raise NotImplementedError

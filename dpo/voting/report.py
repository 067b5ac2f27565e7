"""The report of a study: votes.json, votes.md and votes.html in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from dpo.common.errors import UserError
from dpo.common.files import AGAIN, checksum, write_text
from dpo.common.words import printable
from dpo.pages import votes as pages
from dpo.voting import answers, study, tally
from dpo.voting.figures import figures, numbered


class Made(NamedTuple):
    """What a report wrote, and what it says in short."""

    page: Path
    lines: list[str]  # for the console: here alone numbers of raters stand beside names


def make(folder: Path, *, scores: Sequence[str] = ()) -> Made:
    """Counts the votes of the study in `folder` and writes votes.json, votes.md and votes.html there.

    scores: what is compared with the people: folders of evaluations (with evaluation.json and scores.sqlite), or
    NAME=TABLE as dpo.evaluate takes it. Raises UserError where there is no study, no vote, or a table cannot be read.
    """
    declared = study.read(folder)
    given, seal = _answers(folder)
    content = figures(declared, given)
    if not any(rater["votes"] for rater in content["raters"]):
        raise UserError(f"{folder} has no vote yet: ask people with python -m dpo.vote {folder}")
    if scores:
        from dpo.voting import trust

        out, judged = tally.left_out(declared, given), trust.judged(declared, folder, scores)
        content["scorers"] = {
            question.key: trust.agreement(declared, given, question.key, judged, out) for question in declared.questions
        }
    content["made"] = {
        "answers": seal,
        "study": checksum(folder / study.FILE),
        "version": _version(),
    }
    path = folder / pages.FILE
    write_text(path, json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False), AGAIN)
    page, _ = pages.write_pages(path)
    names = numbered(declared, given)
    flagged = {one["rater"]: "; ".join(one["reasons"]) for one in content["raters"] if one["reasons"]}
    flagged |= {rater: "; ".join(filter(None, [flagged.get(rater), "chooses one side"])) for rater in content["biased"]}
    who = [f"{number} is {name}: {flagged[number]}" for name, number in names.items() if number in flagged]
    return Made(page, [*pages.headline(content), *map(printable, who), str(page)])


def _answers(folder: Path) -> tuple[list[answers.Answer], str]:
    """The answers, and the SHA-256 of just the file that they were read from: people may be voting meanwhile."""
    path = folder / answers.FILE
    while True:
        before = checksum(path) if path.exists() else ""
        given = answers.read(folder)
        if not before or checksum(path) == before:
            return given, before


def _version() -> str:
    try:
        return version("diffusion-dpo")
    except PackageNotFoundError:  # run from its folder
        return "not installed"

"""A study as it was declared before the first vote: study.json, sealed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo.common.errors import UserError, reading
from dpo.common.files import AGAIN, beside, replace, sealed, sync_file, unseal, write_text, writing

FILE = "study.json"
LENGTH = 32  # bytes of the secret
SECRET = "secret"  # beside it, for this machine alone: addresses and links are keyed with it
FORMAT = 1
SEAL = "sha256"
BROKEN = -1  # in Item.sides: an image made unusable on purpose

Kind = Literal["vote", "broken", "same"]
KINDS: tuple[Kind, ...] = ("vote", "broken", "same")


@dataclass(frozen=True)
class Question:
    """What is asked of two images."""

    key: str
    text: str


@dataclass(frozen=True)
class Rule:
    """What leaves a rater out, where not everybody is counted: a share below one of these. 0: that share does not count.

    A rater who met none of such checks is not left out by them.
    """

    broken: float = 0.75  # of the items with a broken image, those where the sound one was chosen; a tie is not right
    repeats: float = 0.0  # of the questions asked again with sides swapped, those answered alike


@dataclass(frozen=True)
class Item:
    """Two images of one prompt. Which stands on the left is said by each answer, not here."""

    id: str  # keyed with the study's secret: tells nothing
    prompt: str
    category: str
    kind: Kind  # vote: counted; broken: one image is unusable; same: both are one image
    sides: tuple[int, int]  # of each image, an index into Study.sides; BROKEN for an unusable one
    images: tuple[str, str]  # paths, `folder / path` each: those of checks lie in the study's folder
    hashes: tuple[str, str]  # of their pixels


@dataclass(frozen=True)
class Study:
    """All that decides what raters are asked, and how the answers will be read."""

    name: str
    seed: int
    title: str
    instructions: str
    notice: str  # of content
    questions: tuple[Question, ...]
    tie: bool  # "can't tell" may be answered
    votes: int  # wanted for each item of kind "vote" and question
    sides: tuple[str, ...]  # names; the first is the base
    items: tuple[Item, ...]
    repeats: float = 0.05  # share of a rater's votes asked again with sides swapped; never counted as votes
    rule: Rule = Rule()
    note: str = ""  # what was said about prompts, subsets and pairs
    asked: Mapping[str, str] = field(default_factory=dict)  # settings of the command that declared it, as text
    format: int = FORMAT


def write(folder: Path, study: Study) -> Path:
    """Writes study.json in one step; its path. Raises UserError where that cannot be written."""
    path = folder / FILE
    write_text(path, sealed(asdict(study), SEAL), AGAIN)
    return path


def is_study(folder: Path) -> bool:
    """Whether a study was declared in this folder."""
    return (folder / FILE).is_file()


def read(folder: Path) -> Study:
    """The study that was declared in `folder`. Raises UserError where none is, or where it was changed since."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {FILE}: declare a study with python -m dpo.vote A B --output {folder}")
    with reading(str(path), "put it back as it was declared, or declare the study in another folder"):
        content, whole = unseal(path.read_text(encoding="utf-8"), SEAL)
        if not whole:
            raise UserError(
                f"{path} was changed after it was declared, so its votes would mean something else: put it back as it was, "
                "or declare a study in another folder"
            )
        if content.get("format") != FORMAT:
            raise UserError(f"{path}: format {content.get('format')!r} is not known here; update this package")
        try:
            return _study(content)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"it lacks a part of a study: {error}") from error


def secret(folder: Path) -> bytes:
    """The key of a study's addresses and links, made where there is none yet: only the owner may read it.

    Raises UserError where it cannot be read or written.
    """
    path = folder / SECRET
    if not path.exists():
        part = beside(path)
        with writing(path, AGAIN):
            try:
                with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                    file.write(secrets.token_hex(LENGTH))
                sync_file(part)
                replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    with reading(str(path), "delete it, and give the raters their links anew"):
        key = bytes.fromhex(path.read_text(encoding="ascii"))
        if len(key) != LENGTH:
            raise ValueError("it was changed")
        return key


def _study(content: dict[str, Any]) -> Study:
    items = tuple(
        Item(**{**item, **{name: tuple(item[name]) for name in ("sides", "images", "hashes")}})
        for item in content["items"]
    )
    plain = {name: value for name, value in content.items() if name not in ("items", "questions", "rule", "sides")}
    return Study(
        **plain,
        items=items,
        questions=tuple(Question(**question) for question in content["questions"]),
        rule=Rule(**content["rule"]),
        sides=tuple(content["sides"]),
    )

"""Votes as preference pairs that dpo.train reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dpo.common.errors import OF_READING, UserError, reading
from dpo.common.files import make_folder
from dpo.common.pictures import pixel_hash
from dpo.common.words import digest, listed
from dpo.data.writing import Judged, Layout, write_pairs
from dpo.evaluating.scoring import read_image
from dpo.voting import answers, study, tally
from dpo.voting.study import Item, Study

FILE = "votes.parquet"
MADE = "dpo.vote"  # in the file's metadata: the hash of the study
LAYOUTS: tuple[Layout, ...] = ("pickapic", "chosen-rejected")


def write(folder: Path, output: Path, question: str | None = None, *, layout: Layout = "pickapic") -> list[str]:
    """Writes the votes of one question as a parquet file of preference pairs; lines on what was written.

    A pair's label is that of the majority, a tie 0.5; `p` is the share of its votes, a tie one half, and beside stand
    question, votes and ties. Raters that the study's rule leaves out do not count. folder: of the study. output: the
    file, or a folder, which gets `votes.parquet`; an earlier export of this study is replaced. question: its key; None: the
    first. Raises UserError, also where another file is there.
    """
    if output.suffix not in ("", ".parquet") and not output.is_dir():
        raise UserError(f"--export {output}: pairs are written as parquet; name a .parquet file, or a folder")
    declared, given = study.read(folder), answers.read(folder)
    keys = [one.key for one in declared.questions]
    chosen = keys[0] if question is None else question
    if chosen not in keys:
        raise UserError(f"--question {chosen}: the study asks {listed(keys)}")
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: there are {', '.join(LAYOUTS)}")
    path = output if output.suffix == ".parquet" else output / FILE
    mark = digest(*(item.id for item in declared.items))
    if path.exists() and not _is_made(path, mark):
        raise UserError(
            f"{path} is there already, and no export of this study: remove it, or name another with --export"
        )
    out = tally.left_out(declared, given)
    counted = _counted(declared, tally.votes(declared, given, chosen, without=out))
    if not counted:
        raise UserError(f"{folder} has no vote on {chosen} that counts: ask people with python -m dpo.vote {folder}")
    make_folder(path.parent, "--export")
    written = write_pairs(path, _rows(declared, folder, chosen, counted), layout, about={MADE: mark})
    ties = sum(not sums.any() or sums[0] == sums[2] for sums in counted.values())
    votes = int(sum(sums.sum() for sums in counted.values()))
    lines = [
        f"{path}: {written} pairs from {votes:,} votes on {chosen}, {ties} of them ties; dpo.train takes them as --data {path}"
    ]
    everybody = len(tally.raters(given))
    return [*lines, *([f"left out by the study's rule: {len(out)} of {everybody} raters"] if out else [])]


def _is_made(path: Path, mark: str) -> bool:
    """Whether an export of the study of this hash wrote a file."""
    try:
        return (pq.read_schema(path).metadata or {}).get(MADE.encode()) == mark.encode()
    except OF_READING:
        return False


def _counted(declared: Study, votes: tally.Votes) -> dict[int, np.ndarray]:
    """By number of the item with votes: those for its first image, ties, those for its second."""
    found: dict[int, np.ndarray] = {}
    for item, value in zip(votes.item.tolist(), votes.value.tolist(), strict=True):
        first, second = declared.items[item].sides
        sums = found.setdefault(item, np.zeros(3, int))
        sums[1 + int(value) * (1 if second > first else -1)] += 1
    return dict(sorted(found.items()))


def _rows(declared: Study, folder: Path, question: str, counted: dict[int, np.ndarray]) -> Iterator[Judged]:
    """A pair for each item, its images as their files have them."""
    for number, sums in counted.items():
        item = declared.items[number]
        first, ties, second = (int(count) for count in sums)
        yield Judged(
            caption=item.prompt,
            first=_file(folder, item, 0),
            second=_file(folder, item, 1),
            uid_0=item.hashes[0],
            uid_1=item.hashes[1],
            label_0=0.5 if first == second else float(first > second),
            p=(first + ties / 2) / (first + ties + second),
            model_0=declared.sides[item.sides[0]],
            model_1=declared.sides[item.sides[1]],
            extra={"question": question, "votes": float(first + ties + second), "ties": float(ties)},
        )


def _file(folder: Path, item: Item, place: int) -> bytes:
    """The bytes of an image, which must still be the one that people saw. Raises UserError."""
    path = folder / item.images[place]
    if pixel_hash(read_image(path)) != item.hashes[place]:
        raise UserError(f"{path} is not the image that people voted on: put it back as it was")
    with reading(str(path), "put it back as it was"):
        return path.read_bytes()

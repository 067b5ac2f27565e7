"""The folder that the pairs command writes: what belongs to it, what it says of itself, and how its pairs are read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from dpo.common.errors import UserError, reading
from dpo.common.files import AGAIN, remove, sweep, write_text
from dpo.common.words import SHOWN, listed
from dpo.data.pairs import image_ref, pair_key
from dpo.data.tables import json_rows
from dpo.pages.pairs import PAGE, SHEET

SUMMARY, TABLE, EMBEDDED = "summary.json", "pairs.jsonl", "data/train-00000-of-00001.parquet"
WHAT, FORMAT = "pairs", 1  # under "what" and "format" of summary.json
OWN = (SUMMARY, TABLE, "data", PAGE, SHEET)


def check_free(folder: Path) -> None:
    """Raises UserError where a folder holds what this command did not make."""
    for name in (SUMMARY, TABLE, PAGE, SHEET):
        sweep(folder, name)
    sweep(folder / "data", Path(EMBEDDED).name)
    strange = sorted(path.name for path in folder.glob("*") if not path.name.startswith(".") and path.name not in OWN)
    if read(folder) is None:
        strange += [name for name in OWN if (folder / name).exists()]
    data = folder / "data"
    strange += [
        f"data/{path.name}" for path in data.glob("*") if f"data/{path.name}" != EMBEDDED and path.name[0] != "."
    ]
    if strange:
        raise UserError(
            f"--output {folder} holds {listed(strange)} that python -m dpo.pairs did not make: name another folder"
        )


def check_same(folder: Path, asked: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises UserError where the folder's pairs were made with another value of one of `names` than `asked` says."""
    known = read(folder)
    if known is None:
        return
    was, now = known.get("asked", {}), json.loads(json.dumps(asked))
    for name in names:
        if was.get(name) != now.get(name):
            raise UserError(
                f"--output {folder} was made otherwise ({name}: {_shown(was.get(name))} there, {_shown(now.get(name))} now): "
                "name another folder, or --overwrite it"
            )


def begin(folder: Path, asked: Mapping[str, Any], about: Mapping[str, Any], overwrite: bool) -> None:
    """Notes what the folder will hold, and deletes what it held. Raises UserError where that was made otherwise.

    asked: what decides the content; about: what else stands in summary.json from now on.
    """
    if not overwrite:
        check_same(folder, asked, {**(read(folder) or {}).get("asked", {}), **asked})
    write(folder, {"asked": asked, "finished": False, **about})
    for name in (TABLE, EMBEDDED, PAGE, SHEET):
        remove(folder / name)


def _shown(value: Any) -> str:
    return json.dumps(value)[:SHOWN]


def read(folder: Path) -> dict[str, Any] | None:
    """What summary.json says; None where there is none, or another program's."""
    try:
        found = json.loads((folder / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and (found.get("what"), found.get("format")) == (WHAT, FORMAT) else None


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Replaces summary.json in one step. Raises UserError where it cannot be written."""
    text = json.dumps({"what": WHAT, "format": FORMAT, **content}, indent=1, allow_nan=False)
    write_text(folder / SUMMARY, text + "\n", AGAIN)


class Told(NamedTuple):
    """What this command knows of the pairs that it made."""

    direction: str  # which image of a pair is the chosen one, in words
    named: str  # what the numbers are
    numbers: dict[int, tuple[float, float]]  # of the chosen and the rejected image, by the pair's key


def told(place: Path) -> Told | None:
    """What is known of a set's pairs; None for one that this command did not make: a person may name any.

    place: its folder, or the file of its pairs.
    """
    for folder in (place, place.parent, place.parent.parent):
        known = read(folder)
        if known is not None and isinstance(known.get("direction"), str) and isinstance(known.get("number"), str):
            ends = f"{known['number']}_chosen", f"{known['number']}_rejected"
            with reading(str(folder), "make the pairs again"):
                return Told(known["direction"], known["number"], dict(_rows(folder, ends)))
    return None


def _rows(folder: Path, ends: tuple[str, str]) -> Iterator[tuple[int, tuple[float, float]]]:
    for row in _stored(folder, ends):
        chosen, rejected = (image_ref(row.get(end), None, None).uid for end in ("chosen", "rejected"))
        numbers = [float(value) for end in ends if isinstance(value := row.get(end), int | float)]
        if len(numbers) == 2:
            yield pair_key(chosen, rejected, row.get("prompt") or ""), (numbers[0], numbers[1])


def _stored(folder: Path, ends: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a set, a few with their images in memory."""
    if (folder / TABLE).is_file():
        yield from (row for _, row in json_rows(folder / TABLE))
    elif (folder / EMBEDDED).is_file():
        with pq.ParquetFile(folder / EMBEDDED) as file:
            for part in file.iter_batches(64, columns=["prompt", "chosen", "rejected", *ends]):
                yield from part.to_pylist()

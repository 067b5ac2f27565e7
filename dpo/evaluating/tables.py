"""Small tables that other programs write: prompts of images, and scores of images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpo.common.errors import UserError, reading

# Names of columns, the first of which is there and not empty counts.
FILE = ("file", "file_name", "filename", "image", "image_path", "path")
PROMPT = ("prompt", "caption", "text")
SCORE = ("score", "value", "correct", "reward")
SEED = ("seed",)
CATEGORY = ("category", "style", "tag")

T = TypeVar("T")
D = TypeVar("D")


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a CSV, TSV or JSON lines file with a header. Raises UserError."""
    with reading(str(path), "give a CSV, TSV or JSON lines file"), open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
            for number, line in enumerate(filter(str.strip, file), 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, row {number}: is no JSON object")
                yield number, row
        else:
            delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
            yield from enumerate(csv.DictReader(file, delimiter=delimiter), 1)


def cell(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first cell of these names, in any case, that is not empty, as text; true and false are 1 and 0."""
    found = {str(name).lower(): value for name, value in row.items()}
    value = next((found[name] for name in names if found.get(name) not in (None, "")), None)
    if isinstance(value, bool):
        return str(int(value))
    return None if value is None else str(value)


def of_file(path: Path, by_name: Mapping[str, T], default: D, digest: str | None = None) -> T | D:
    """The entry of a file in a table: by its hash, its whole path, or as many last parts of the path as the table has."""
    ends = [path.parts[first:] for first in range(len(path.parts))]
    names = [digest or "", path.as_posix(), *(mark.join(end) for end in ends for mark in "/\\")]
    return next((by_name[name] for name in names if name in by_name), default)

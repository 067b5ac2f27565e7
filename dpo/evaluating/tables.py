"""Small tables that other programs write: prompts of images, and scores of images."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpo.common.errors import UserError, reading
from dpo.common.words import excerpt
from dpo.data.tables import csv_rows

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
    with reading(str(path), "give a CSV, TSV or JSON lines file"):
        if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
            delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
            yield from enumerate((row for _, row in csv_rows(path, delimiter)), 1)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(filter(str.strip, file), 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}, row {number}: is no JSON object")
                yield number, row


def cell(row: Mapping[str, Any], names: Sequence[str], where: str = "") -> str | None:
    """The first cell of these names, in any case, that is not empty, as text; true and false are 1 and 0.

    where: the table and row, for the UserError that a list or an object in such a cell raises.
    """
    found = {str(name).lower(): value for name, value in row.items()}
    name = next((name for name in names if found.get(name) not in (None, "")), None)
    value = None if name is None else found[name]
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: {name} needs text, found {excerpt(value)}")
    if isinstance(value, bool):
        return str(int(value))
    return None if value is None else str(value)


def name_of(path: Path, names: Container[str]) -> str | None:
    """What a table calls a file: its whole path, or as many last parts of the path as the table has."""
    ends = [path.parts[first:] for first in range(len(path.parts))]
    ways = [path.as_posix(), *(mark.join(end) for end in ends for mark in "/\\")]
    return next((way for way in ways if way in names), None)


def of_file(path: Path, by_name: Mapping[str, T], default: D) -> T | D:
    """The entry of a file in a table, by the name that `name_of` finds."""
    name = name_of(path, by_name)
    return default if name is None else by_name[name]

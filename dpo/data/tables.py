"""Pairs of JSONL, JSON and CSV tables, whose images are files beside the table."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.common.errors import UserError
from dpo.common.words import as_on_windows, counted_of, digest, excerpt, excerpt_of_path, first_line
from dpo.data.labels import BLANK, SAME, Columns, find_columns, flag, labels_of, verdict_of, with_more
from dpo.data.pairs import ImageRef, Labelled, Pair, caption_key, image_ref, is_base64, one_image
from dpo.settings.config import Data

CHUNK = 8192  # rows
PROBED = 16  # rows whose image files are looked for at once
READERS, AT_ONCE = 16, 256  # threads that compare files, and pairs that one takes at a time
DELIMITERS = {".csv": ",", ".tsv": "\t"}

Row = dict[str, Any]  # a row of a table by column, as JSON or CSV gave it

logger = logging.getLogger("dpo")


@dataclass(frozen=True)
class TableSource(Labelled):
    """Captions and image paths as Arrow strings, compact in memory; images are read where they are decoded."""

    captions: pa.ChunkedArray  # [n]
    images: tuple[pa.ChunkedArray, ...]  # one or two [n] of paths relative to root
    uids: tuple[pa.ChunkedArray, pa.ChunkedArray] | None
    root: str

    def __getitem__(self, index: int) -> Pair:
        uids = [column[index].as_py() for column in self.uids] if self.uids else [None] * self.sides
        first, *other = (
            image_ref(column[index].as_py(), uid, self.root) for column, uid in zip(self.images, uids, strict=True)
        )
        return self.labelled(index, self.captions[index].as_py(), first, other[0] if other else None)

    def caption_keys(self) -> np.ndarray:
        """[n] int64 hashes of the captions."""
        return np.array([caption_key(caption.as_py()) for caption in self.captions], dtype=np.int64)


def open_table(path: Path, data: Data, kind: str = "auto") -> TableSource:
    """Pairs of a .jsonl, .json (a list of objects), .csv or .tsv file; image paths are relative to its folder.

    kind: see `find_columns`. Raises UserError for missing columns, bad rows, or image paths that lead nowhere.
    """
    is_csv = path.suffix.lower() in DELIMITERS
    rows = csv_rows(path) if is_csv else json_rows(path)
    start = list(islice(rows, 1 if is_csv else CHUNK))  # a row of JSON may leave out what is empty
    if not start:
        raise UserError(f"{path}: has no rows")
    try:
        columns = find_columns(start[0][1], data, str(path), kind)
    except UserError:
        columns = find_columns(dict.fromkeys(chain.from_iterable(row for _, row in start)), data, str(path), kind)
    rows = chain(start, rows)
    columns, table = _columns(path, _watched(path, rows, columns.caption) if is_csv else rows, columns)
    numbers = {name: table[name].to_numpy(zero_copy_only=False) for name in columns.decided_by}
    labels = labels_of(numbers, columns, len(table[columns.caption]), data.ties, str(path))
    keep = np.flatnonzero(labels.keep)
    _probe(path, table, keep, columns)
    keep, same = leave_out_same(str(path.parent), [table[name] for name in columns.images], keep, data.max_pairs)
    kept = {name: column.take(keep) for name, column in table.items()}
    images = tuple(kept[name] for name in columns.images)
    return TableSource(
        kept[columns.caption], images, sides=len(images),
        uids=(kept[columns.uid_0], kept[columns.uid_1]) if columns.uid_0 and columns.uid_1 else None,
        root=str(path.parent), swap=labels.swap[keep], prob=labels.prob[keep], smoothing=data.label_smoothing,
        summary=labels.counts | {
            SAME: labels.counts.get(SAME, 0) + same, BLANK: kept[columns.caption].to_pylist().count(""), "pairs": len(keep)
        },
        fingerprint=fingerprint_of([kept[columns.caption], *images], labels.swap[keep], labels.prob[keep]),
    )  # fmt: skip


@contextmanager
def in_utf8(path: Path) -> Iterator[None]:
    """Around the reading of a text file: raises UserError, which names it, where it is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) of a JSONL file; (number, object) of a JSON file that holds one list. Raises UserError."""
    with in_utf8(path), path.open(encoding="utf-8-sig") as file:
        if file.read(1) == "[":
            file.seek(0)
            text = file.read()
            try:
                rows = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: {_beyond(error)}") from error
            yield from ((number, _named(f"{path}, row {number}", row)) for number, row in enumerate(rows, 1))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {_beyond(error)}") from error
            yield number, _named(f"{path}, line {number}", row)


def _beyond(error: Exception) -> str:
    """What JSON allows and Python does not read: values nested thousands deep, numbers of thousands of digits."""
    return "nested too deeply" if isinstance(error, RecursionError) else f"not a number ({first_line(error)})"


def _named(where: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: needs an object with named values, found {type(row).__name__}")
    return row


def csv_rows(path: Path, delimiter: str | None = None) -> Iterator[tuple[int, Row]]:
    """(number of its first line, row) of a CSV or TSV file; delimiter: as the ending says unless given. Raises UserError."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell is not refused here for being an image
    try:
        with in_utf8(path), path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter or DELIMITERS[path.suffix.lower()])
            named = Counter(name for name in reader.fieldnames or () if name)
            if twice := [name for name, count in named.items() if count > 1]:
                raise UserError(
                    f"{path}, line 1: {named[twice[0]]} columns are named {excerpt(twice[0])}: rename all but one"
                )
            end = 0
            for row in reader:  # the first line of a row; a quote that is never closed takes the file's end with it
                number = max(end + 1, reader.line_num - sum(map(_line_breaks, row.values())))
                end = reader.line_num
                if None in row:
                    raise UserError(
                        f"{path}, line {number}: more values than columns: a text with commas belongs in double quotes, and a double "
                        "quote inside it is written twice"
                    )
                yield number, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}); save it anew") from error
    finally:
        csv.field_size_limit(before)


def _line_breaks(value: object) -> int:
    return len(f"{value}|".splitlines()) - 1 if isinstance(value, str) else 0


def _watched(path: Path, rows: Iterable[tuple[int, Row]], caption: str) -> Iterator[tuple[int, Row]]:
    """The rows; says afterwards which captions go over several lines, as one with a stray quote does."""
    found: list[str] = []
    count = 0
    for number, row in rows:
        text = row.get(caption)
        if isinstance(text, str) and len(text.strip().splitlines()) > 1:
            count += 1
            found += [f"line {number} ({excerpt(text, 40)})"] if len(found) < 3 else []
        yield number, row
    if count:
        logger.warning(
            "%s: captions with line breaks: %d, %s: a stray double quote makes one caption of several rows",
            path, count, ", ".join(found),
        )  # fmt: skip


def _columns(
    path: Path, rows: Iterable[tuple[int, Row]], columns: Columns
) -> tuple[Columns, dict[str, pa.ChunkedArray]]:
    """The needed columns of a table, as Arrow arrays, built CHUNK rows at a time to keep memory flat.

    Also `columns` with more that decide, where a later row names them: rows before have an empty cell there.
    """
    chunks: dict[str, list[pa.Array]] = {}
    rows, done = iter(rows), 0
    while part := list(islice(rows, CHUNK)):
        columns = with_more(columns, chain.from_iterable(row for _, row in part))
        for name in dict.fromkeys(columns.read + columns.decided_by):
            values = [
                (path_cell if name in columns.images else cell)(f"{path}, line {number}", row, name, columns)
                for number, row in part
            ]
            before = [] if name in chunks else [column_of([None] * done, name, columns, str(path))]
            chunks.setdefault(name, before).append(column_of(values, name, columns, str(path)))
        done += len(part)
    return columns, {name: pa.chunked_array(arrays) for name, arrays in chunks.items()}


def column_of(values: Sequence[Any], name: str, columns: Columns, where: str) -> pa.Array:
    """Cells of one column, as `cell` gave them, as an Arrow array. Raises UserError that begins with `where`."""
    of_flag = (columns.has_label, columns.are_different)
    kind = pa.float64() if name in columns.numbers else pa.bool_() if name in of_flag else pa.string()
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} holds half a character (\\ud800 to \\udfff); mend the escape") from error


def path_cell(where: str, row: Row, name: str, columns: Columns) -> str:
    """The path in an image's cell. Raises UserError that begins with `where`, a file and a row."""
    value = row.get(name)
    value = value.get("path") or value.get("bytes") if isinstance(value, dict) else value
    if isinstance(value, str) and is_base64(value):
        raise UserError(
            f"{where}: {name} holds an image as base64 text: write files and give their paths, or use parquet"
        )
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {name} needs the path of an image, found {excerpt(value)}")
    return value


def cell(where: str, row: Row, name: str, columns: Columns) -> str | float | bool | None:
    """The cell of a row, in the type of its column: caption, label, flag or uid.

    Raises UserError that begins with `where`, which names a file and a row.
    """
    value = row.get(name)
    if name == columns.verdict:
        try:
            return verdict_of(value, name)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    if name in columns.numbers:
        try:
            return None if value in (None, "") else float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {name} needs a number, found {excerpt(value)}") from error
    if name in (columns.has_label, columns.are_different):
        try:
            return flag(value, name)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    if name == columns.caption:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {name} needs text, found {type(value).__name__}")
        return value or ""
    return None if value is None else str(value)


def _probe(path: Path, table: dict[str, pa.ChunkedArray], keep: np.ndarray, columns: Columns) -> None:
    """Raises UserError when none of the first few images exists: the paths are then relative to another folder."""
    paths = [name for column in columns.images for name in table[column].take(keep[:PROBED]).to_pylist()]
    if paths and not any(os.path.isfile(path.parent / name) for name in paths):
        raise UserError(
            f"{path}: no such image file: {excerpt_of_path(str(path.parent / paths[0]))} "
            f"(image paths are relative to the table's folder){as_on_windows(paths[0])}"
        )


def _looked_at(root: str, pairs: list[tuple[str, ...]]) -> list[tuple[bool, str | None]]:
    """For each pair whether its paths lead to one image, and the first of them that leads to no file."""
    found = []
    for pair in pairs:
        refs = [ImageRef(name, path=os.path.join(root, name)) for name in pair]
        gone = next((name for name, ref in zip(pair, refs, strict=True) if not os.path.isfile(str(ref.path))), None)
        found.append((len(refs) == 2 and one_image(*refs), gone))
    return found


def leave_out_same(
    root: str, images: Sequence[pa.ChunkedArray], keep: np.ndarray, most: int | None
) -> tuple[np.ndarray, int]:
    """Of the rows `keep` [m] int64 the first `most` whose two paths, relative to `root`, lead to different images.

    images: the columns of paths; of a single column all rows stay. Also how many rows were left out on the way because
    theirs lead to one. Every file is looked at for its size; those as long as their partner are read. Says which files
    are not there: their pairs stay, and are holes.
    """
    chosen, same, gone = [np.empty(0, dtype=np.int64)], 0, list[str]()
    with ThreadPoolExecutor(READERS) as pool:
        for begin in range(0, len(keep), CHUNK):
            if most is not None and (wanted := most - sum(map(len, chosen))) <= 0:
                break
            part = keep[begin : begin + CHUNK]
            paths = list(zip(*(column.take(part).to_pylist() for column in images), strict=True))
            tasks = (paths[i : i + AT_ONCE] for i in range(0, len(paths), AT_ONCE))
            looked = [each for found in pool.map(partial(_looked_at, root), tasks) for each in found]
            alike = np.array([same_twice for same_twice, _ in looked])
            if most is not None and len(enough := np.flatnonzero(~alike)) > wanted:
                alike, part = alike[: enough[wanted]], part[: enough[wanted]]
            same += int(alike.sum())
            chosen.append(part[~alike])
            gone += [name for same_twice, name in looked[: len(part)] if name is not None and not same_twice]
    rows = np.concatenate(chosen)
    if gone:
        logger.warning(
            "%s: %s left out of every update: %s%s%s",
            root,
            counted_of(
                len(gone), len(rows), "pairs" if len(images) == 2 else "rows", "has an image that is not there, and is",
                "have an image that is not there, and are",
            ),
            ", ".join(excerpt_of_path(name) for name in gone[:3]), ", ..." * (len(gone) > 3),
            as_on_windows(gone[0]),
        )  # fmt: skip
    return rows, same


def fingerprint_of(columns: Sequence[pa.ChunkedArray], *arrays: np.ndarray) -> str:
    """A hash of captions, paths and labels [n], whatever folder they lie in."""
    total = hashlib.blake2b(digest_size=16)
    for row in zip(*columns, strict=True):
        total.update(digest(*(value.as_py() for value in row)).encode())
    for array in arrays:
        total.update(array.tobytes())
    return total.hexdigest()

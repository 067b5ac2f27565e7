"""Pairs whose images are files: JSONL, JSON and CSV tables, and folders `w/` and `l/` of same-named files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.common.errors import UserError
from dpo.common.words import digest
from dpo.data.labels import CAPTION, Columns, find_columns, read_labels
from dpo.data.pairs import Pair, caption_key, image_ref, make_pair
from dpo.settings.config import Data

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
CHUNK = 8192  # rows
PROBED = 16  # rows whose image files are looked for at once

Row = dict[str, Any]  # a row of a table by column, as JSON or CSV gave it


@dataclass(frozen=True)
class TableSource:
    """Captions and image paths as Arrow strings, compact in memory; images are read where they are decoded."""

    captions: pa.ChunkedArray  # [n]
    first: pa.ChunkedArray  # [n] paths relative to root
    second: pa.ChunkedArray  # [n]
    uids: tuple[pa.ChunkedArray, pa.ChunkedArray] | None
    root: str
    swap: np.ndarray  # [n] bool
    prob: np.ndarray  # [n] fp32
    smoothing: float
    summary: dict[str, int]
    fingerprint: str
    groups: None = None
    window: None = None

    def __len__(self) -> int:
        return len(self.prob)

    def __getitem__(self, index: int) -> Pair:
        uids = [column[index].as_py() for column in self.uids] if self.uids else [None, None]
        first = image_ref(self.first[index].as_py(), uids[0], self.root)
        second = image_ref(self.second[index].as_py(), uids[1], self.root)
        swap, prob = bool(self.swap[index]), float(self.prob[index])
        return make_pair(self.captions[index].as_py(), first, second, swap, prob, self.smoothing)

    def caption_keys(self) -> np.ndarray:
        """[n] int64 hashes of the captions."""
        return np.array([caption_key(caption.as_py()) for caption in self.captions], dtype=np.int64)


def open_table(path: Path, data: Data, kind: str = "auto") -> TableSource:
    """Pairs of a .jsonl, .json (a list of objects), .csv or .tsv file; image paths are relative to its folder.

    kind: see `find_columns`. Raises UserError for missing columns, bad rows, or image paths that lead nowhere.
    """
    rows = _csv_rows(path) if path.suffix in (".csv", ".tsv") else _json_rows(path)
    start = list(islice(rows, 1))
    if not start:
        raise UserError(f"{path}: has no rows")
    columns = find_columns(start[0][1], data, str(path), kind)
    table = _columns(path, chain(start, rows), columns)
    numbers = {name: table[name].to_numpy(zero_copy_only=False) for name in columns.decided_by}
    try:
        labels = read_labels(numbers, columns, len(table[columns.caption]), data.ties)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the labels are not numbers ({error})") from error
    keep = np.flatnonzero(labels.keep)[: data.max_pairs]
    kept = {name: column.take(keep) for name, column in table.items()}
    _probe(path, kept, columns)
    first, second = kept[columns.first], kept[columns.second]
    return TableSource(
        kept[columns.caption], first, second,
        uids=(kept[columns.uid_0], kept[columns.uid_1]) if columns.uid_0 and columns.uid_1 else None,
        root=str(path.parent), swap=labels.swap[keep], prob=labels.prob[keep], smoothing=data.label_smoothing,
        summary=labels.counts | {"without a caption": kept[columns.caption].to_pylist().count(""), "pairs": len(keep)},
        fingerprint=_fingerprint(kept[columns.caption], first, second, labels.swap[keep], labels.prob[keep]),
    )  # fmt: skip


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) of a JSONL file; (number, object) of a JSON file that holds one list. Raises UserError."""
    with path.open(encoding="utf-8-sig") as file:
        if file.read(1) == "[":
            file.seek(0)
            try:
                yield from enumerate(json.load(file), 1)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: needs an object with named values, found {type(row).__name__}")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more values than columns; put a text with commas in double quotes"
                )
            yield reader.line_num, row


def _columns(path: Path, rows: Iterable[tuple[int, Row]], columns: Columns) -> dict[str, pa.ChunkedArray]:
    """The needed columns of a table, as Arrow arrays, built CHUNK rows at a time to keep memory flat."""
    names = dict.fromkeys(columns.read + columns.decided_by)
    chunks: dict[str, list[pa.Array]] = {name: [] for name in names}
    rows = iter(rows)
    while part := list(islice(rows, CHUNK)):
        for name in names:
            values = [_cell(path, number, row, name, columns) for number, row in part]
            number_like = name in (columns.label_0, columns.label_1)
            flag = name in (columns.has_label, columns.are_different)
            chunks[name].append(pa.array(values, pa.float64() if number_like else pa.bool_() if flag else pa.string()))
    return {name: pa.chunked_array(arrays) for name, arrays in chunks.items()}


def _cell(path: Path, number: int, row: Row, name: str, columns: Columns) -> str | float | bool | None:
    """The cell of a row, in the type of its column. Raises UserError that names the line."""
    value = row.get(name)
    if name in (columns.first, columns.second):
        value = value.get("path") if isinstance(value, dict) else value
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}, line {number}: {name} needs the path of an image, found {value!r}")
        return value
    if name in (columns.label_0, columns.label_1):
        try:
            return None if value in (None, "") else float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: {name} needs a number, found {value!r}") from error
    if name in (columns.has_label, columns.are_different):
        return value if value is None or isinstance(value, bool) else str(value).lower() not in ("false", "0", "")
    if name == columns.caption:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}, line {number}: {name} needs text, found {type(value).__name__}")
        return value or ""
    return None if value is None else str(value)


def _probe(path: Path, table: dict[str, pa.ChunkedArray], columns: Columns) -> None:
    """Raises UserError when none of the first few images exists: the paths are then relative to another folder."""
    paths = table[columns.first][:PROBED].to_pylist() + table[columns.second][:PROBED].to_pylist()
    if paths and not any((path.parent / name).is_file() for name in paths):
        raise UserError(
            f"{path}: no such image file: {path.parent / paths[0]} (image paths are relative to the table's folder)"
        )


def _fingerprint(
    captions: pa.ChunkedArray, first: pa.ChunkedArray, second: pa.ChunkedArray, *arrays: np.ndarray
) -> str:
    total = hashlib.blake2b(digest_size=16)
    for row in zip(captions, first, second, strict=True):
        total.update(digest(*(value.as_py() for value in row)).encode())
    for array in arrays:
        total.update(array.tobytes())
    return total.hexdigest()


# --- folders


def open_folders(root: Path, data: Data) -> TableSource:
    """Same-named images in root/w (preferred) and root/l.

    Captions come from metadata.jsonl (file_name, caption) or captions.txt (name, tab, caption) in root or root/w, or
    from a .txt file beside each image in w/ or l/; a pair without one has the empty caption. Names are compared without
    their extension where that is unique in its folder.
    """
    wins, losses = _images(root / "w"), _images(root / "l")
    names = sorted(wins.keys() & losses.keys())
    captions = _captions(root)
    texts = [_caption(root, name, wins[name], captions) for name in names]
    missing = sum(text is None for text in texts)
    names, texts = names[: data.max_pairs], [text or "" for text in texts[: data.max_pairs]]
    first = pa.chunked_array([pa.array([f"w/{wins[name]}" for name in names], pa.string())])
    second = pa.chunked_array([pa.array([f"l/{losses[name]}" for name in names], pa.string())])
    column = pa.chunked_array([pa.array(texts, pa.string())])
    n = len(names)
    counts = {"rows": len(wins.keys() | losses.keys()), "without a partner": len(wins.keys() ^ losses.keys())}
    return TableSource(
        column, first, second, uids=None, root=str(root), swap=np.zeros(n, dtype=bool), prob=np.ones(n, dtype=np.float32),
        smoothing=data.label_smoothing, summary=counts | {"without a caption": missing, "pairs": n},
        fingerprint=_fingerprint(column, first, second),
    )  # fmt: skip


def _images(folder: Path) -> dict[str, str]:
    """Name -> relative path of the images below a folder; the name is without extension unless two images share it."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    stems = [path.with_suffix("").as_posix() for path in paths]
    count = Counter(stems)
    return {
        path.as_posix() if count[stem] > 1 else stem: path.as_posix() for path, stem in zip(paths, stems, strict=True)
    }


def _captions(root: Path) -> dict[str, str]:
    """Image name -> caption from metadata.jsonl and captions.txt."""
    found: dict[str, str] = {}
    for folder in (root / "w", root):
        if (folder / "metadata.jsonl").is_file():
            path = folder / "metadata.jsonl"
            for number, row in _json_rows(path):
                caption = next((row[name] for name in CAPTION if name in row), None)
                if "file_name" not in row or caption is None:
                    raise UserError(f"{path}, line {number}: needs file_name and caption, found {', '.join(row)}")
                found[str(row["file_name"])] = str(caption)
        if (folder / "captions.txt").is_file():
            for line in (folder / "captions.txt").read_text(encoding="utf-8-sig").splitlines():
                name, tab, caption = line.partition("\t")
                if tab:
                    found[name.strip()] = caption.strip()
    return found


def _caption(root: Path, name: str, file: str, captions: dict[str, str]) -> str | None:
    for spelling in (file, f"w/{file}", name):
        if spelling in captions:
            return captions[spelling]
    for side in ("w", "l"):
        beside = (root / side / name).with_name(Path(file).stem + ".txt")
        if beside.is_file():
            return beside.read_text(encoding="utf-8-sig").strip()
    return None

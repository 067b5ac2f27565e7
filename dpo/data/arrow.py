"""Pairs of a folder that `datasets.Dataset.save_to_disk` wrote, and which Arrow columns can hold captions and images.

The files of such a folder are mapped into memory: a row costs the reading of that row, and the size of a set is free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo.common.errors import UserError, reading
from dpo.common.files import Mapped
from dpo.common.words import digest, excerpt_of_path, first_line, listed
from dpo.data.labels import BLANK, SAME, Columns, find_columns, labels_of
from dpo.data.listing import NoSplit
from dpo.data.pairs import ImageRef, Labelled, Pair, caption_key, image_ref, one_image
from dpo.settings.config import Data

STATE, INFO = "state.json", "dataset_info.json"  # what save_to_disk writes of a set
SPLITS = "dataset_dict.json"  # and of a folder of sets


def check_schema(schema: pa.Schema, columns: Columns, where: str) -> None:
    """Raises UserError where the columns of captions and images are of types that hold none."""
    text = _plain(schema.field(columns.caption).type)
    if not _is_text(text):
        raise UserError(f"{where}: the captions in {columns.caption} are {_named(text)}, not text")
    for name in columns.images:
        kind = _plain(schema.field(name).type)
        inside = {field.name for field in kind} if pa.types.is_struct(kind) else set()
        if not (_is_text(kind) or _is_bytes(kind) or inside & {"bytes", "path"}):
            raise UserError(
                f"{where}: the images in {name} are {_named(kind)}, not files: "
                "give one image file a cell, as its bytes, {bytes, path} or a path; arrays can be saved as PNG"
            )


def _plain(kind: pa.DataType) -> pa.DataType:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _named(kind: pa.DataType) -> str:
    return listed([str(kind).splitlines()[0]])


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


@dataclass(frozen=True)
class ArrowSource(Labelled):
    """Pairs of a table in mapped memory."""

    table: pa.Table  # the columns in use
    columns: Columns
    root: str  # what paths in cells are relative to
    row: np.ndarray  # [n] int64
    mapped: Mapped  # the files of the set

    def __getitem__(self, index: int) -> Pair:
        row = int(self.row[index])
        self.mapped.check()
        with reading(f"{self.root}, row {row}", "write the set again"):
            first, *other = _images(self.table, self.columns, self.root, row)
            caption = self.table.column(self.columns.caption)[row].as_py() or ""
        return self.labelled(index, caption, first, other[0] if other else None)

    def caption_keys(self) -> np.ndarray:
        """[n] int64 hashes of the captions; reads that column only."""
        captions = self.table.column(self.columns.caption)
        self.mapped.check()
        with reading(self.root, "write the set again"):
            return np.array([caption_key(captions[row].as_py() or "") for row in self.row.tolist()], dtype=np.int64)


def _images(table: pa.Table, columns: Columns, root: str, row: int) -> list[ImageRef]:
    def cell(name: str | None) -> Any:
        return None if name is None else table.column(name)[row].as_py()

    return [image_ref(cell(name), cell(uid), root) for name, uid in zip(columns.images, (columns.uid_0, columns.uid_1))]


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return all((folder / name).is_file() for name in (STATE, INFO)) or has_splits(folder)


def has_splits(folder: Path) -> bool:
    """Whether a saved folder is one of several sets."""
    return (folder / SPLITS).is_file()


def open_arrow(folder: Path, data: Data, split: str, names: dict[str, str], kind: str = "auto") -> ArrowSource:
    """Pairs of a saved set, or of one `split` of several; `names` has other words for splits.

    kind: see `find_columns`. Raises UserError for a missing split, a damaged folder, missing columns, and captions,
    images or labels of a wrong type.
    """
    if has_splits(folder):
        found = _splits(folder / SPLITS)
        chosen = next((name for name in (split, names.get(split)) if name in found), None)
        chosen = chosen or next((name for name in found if names.get(name, name) == names.get(split, split)), None)
        if chosen is None:
            raise NoSplit(f"{folder}: has no split {split!r}, found {listed(found)}")
        folder = folder / chosen
    mapped = Mapped(sorted(folder.glob("*.arrow")))
    table = _table(folder)
    columns = find_columns(table.column_names, data, str(folder), kind)
    check_schema(table.schema, columns, str(folder))
    table = table.select(list(dict.fromkeys(columns.read + columns.decided_by)))
    with reading(str(folder), "save it again"):  # Arrow ends the process where it meets offsets that lead out of a file
        table.validate(full=True)  # of images their offsets alone are read
    decided_by = {name: table.column(name).to_numpy() for name in columns.decided_by}
    labels = labels_of(decided_by, columns, table.num_rows, data.ties, str(folder))
    same = _one_image_twice(table, columns, str(folder), labels.keep)
    keep = np.flatnonzero(labels.keep & ~same)[: data.max_pairs]
    blank = _lengths(table.column(columns.caption)) <= 0
    counts = {SAME: labels.counts.get(SAME, 0) + int(same.sum()), BLANK: int(blank[keep].sum()), "pairs": len(keep)}
    swap, prob = labels.swap[keep], labels.prob[keep]
    sizes = [str(column.nbytes) for column in table.columns]
    settings = (repr(columns), data.ties, str(data.max_pairs))
    return ArrowSource(
        table, columns, str(folder), keep, mapped, sides=len(columns.images), swap=swap, prob=prob,
        smoothing=data.label_smoothing, summary=labels.counts | counts,
        fingerprint=digest(str(table.num_rows), *sizes, *settings, keep.tobytes().hex(), swap.tobytes().hex(),
            prob.tobytes().hex()),
    )  # fmt: skip


def _splits(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text("utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); give the folder of one split") from error


def _table(folder: Path) -> pa.Table:
    """The mapped rows of one saved set."""
    import datasets  # late: it takes a second or two

    datasets.disable_progress_bars()
    try:
        return datasets.load_from_disk(str(folder)).with_format("arrow")[:]
    except Exception as error:  # errors of several libraries: a missing file, JSON, Arrow, features of another version
        raise UserError(
            f"{excerpt_of_path(str(folder))}: cannot be read as a saved data set ({first_line(error)}); save it again"
        ) from error


def _one_image_twice(table: pa.Table, columns: Columns, root: str, keep: np.ndarray) -> np.ndarray:
    """[n] bool: rows among `keep` whose two images are one. Only images of equal length are read."""
    same = np.zeros(len(keep), dtype=bool)
    if columns.second is None:
        return same
    lengths = [_lengths(table.column(name)) for name in columns.images]
    for row in np.flatnonzero(keep & (lengths[0] == lengths[1])).tolist():
        same[row] = one_image(*_images(table, columns, root, row))
    return same


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """[n] int64: bytes of text or of an image file in each cell, -1 where it has none."""
    if pa.types.is_struct(column.type):
        if "bytes" not in {field.name for field in column.type}:
            return np.full(len(column), -1)
        column = pc.struct_field(column, "bytes")
    kind = _plain(column.type)
    if _is_text(kind) or pa.types.is_binary_view(kind):  # views and dictionaries have no lengths
        column = column.cast(pa.large_string() if _is_text(kind) else pa.large_binary())
    return pc.fill_null(pc.binary_length(column), -1).to_numpy().astype(np.int64)

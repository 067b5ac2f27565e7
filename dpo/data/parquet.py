"""Pairs from parquet files: an index of the labels, and images read a row group at a time.

Opening reads footers and the small columns (labels, uids) and never an image; about 15 bytes a pair stay in memory. A
row group is the least that parquet can read, so a few recent ones are kept in memory, and `order.epoch_order` keeps the
pairs of a row group close together.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import UserError
from dpo.common.words import digest, first_line
from dpo.data.labels import Columns, RowLabels, find_columns, read_labels
from dpo.data.pairs import Pair, caption_key, image_ref, make_pair
from dpo.settings.config import Data

WINDOW_BYTES = 2 * 1024**3  # of row groups in use at once; another value changes the order of an epoch
SCANNERS = 8  # files opened side by side

logger = logging.getLogger("dpo")


@dataclass(frozen=True)
class Files:
    """Parquet files by name. Paths of images in a cell are relative to the parquet file."""

    names: list[str]  # to show and to sort by
    open: Callable[[str], Any]  # name -> a path or a file object
    root: str | None = None  # the folder that the names are relative to; None on the hub


@dataclass(frozen=True)
class _Scan:
    """One file without its images: labels of its rows, and rows and bytes of its row groups."""

    labels: RowLabels
    group_rows: list[int]
    group_bytes: list[int]


def _scan(files: Files, name: str, columns: Columns, ties: str) -> _Scan:
    with _opened(files, name) as file:
        missing = [c for c in columns.read + columns.decided_by if c not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{name}: column {missing[0]} is missing, found {', '.join(file.schema_arrow.names)}")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        small = file.read(columns=columns.decided_by) if columns.decided_by else None
    table = {c: small.column(c).to_numpy(zero_copy_only=False) for c in columns.decided_by} if small is not None else {}
    rows = sum(group.num_rows for group in groups)
    try:
        labels = read_labels(table, columns, rows, ties)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: the labels are not numbers ({error})") from error
    return _Scan(labels, [group.num_rows for group in groups], [_bytes_of(group, columns.read) for group in groups])


def _bytes_of(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """Size in memory of the columns `names` of a row group."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names)


class _opened:
    """`with _opened(files, name) as file`: closes the ParquetFile, and turns its read errors into a UserError."""

    def __init__(self, files: Files, name: str):
        self.files, self.name = files, name

    def __enter__(self) -> pq.ParquetFile:
        try:
            self.file = pq.ParquetFile(self.files.open(self.name))
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close(force=True)
        if isinstance(error, (pa.ArrowException, OSError)):
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> UserError:
        return UserError(
            f"{self.name}: cannot be read as parquet ({first_line(error)}); fetch it again or leave it out"
        )


@dataclass
class ParquetSource:
    """Pairs of parquet files. Safe to use from several threads; not meant to be sent to worker processes."""

    files: Files
    columns: Columns
    smoothing: float
    file: np.ndarray  # [n] int32
    group: np.ndarray  # [n] int32, row group within the file
    row: np.ndarray  # [n] int32, row within the row group
    swap: np.ndarray  # [n] bool
    prob: np.ndarray  # [n] fp32
    groups: np.ndarray  # [n] int32, row group within the set
    window: int | None
    kept: int  # row groups kept in memory
    summary: dict[str, int]
    fingerprint: str
    cache: OrderedDict[int, pa.Table] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> Pair:
        table, row, columns = self._read(index), int(self.row[index]), self.columns

        def cell(name: str | None) -> Any:
            return None if name is None else table.column(name)[row].as_py()

        root = self.files.root and str(Path(self.files.root, self.files.names[self.file[index]]).parent)
        first = image_ref(cell(columns.first), cell(columns.uid_0), root)
        second = image_ref(cell(columns.second), cell(columns.uid_1), root)
        swap, prob = bool(self.swap[index]), float(self.prob[index])
        return make_pair(cell(columns.caption) or "", first, second, swap, prob, self.smoothing)

    def _read(self, index: int) -> pa.Table:
        """The row group of a pair, from memory or from its file."""
        number = int(self.groups[index])
        with self.lock:
            if number in self.cache:
                self.cache.move_to_end(number)
            else:
                while len(self.cache) >= self.kept:
                    self.cache.popitem(last=False)
                with _opened(self.files, self.files.names[self.file[index]]) as file:
                    self.cache[number] = file.read_row_group(int(self.group[index]), columns=self.columns.read)
            return self.cache[number]

    def caption_keys(self) -> np.ndarray:
        """[n] int64 hashes of the captions; reads that column only."""
        keys = np.empty(len(self), dtype=np.int64)
        starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        for begin, end in zip(starts, np.append(starts[1:], len(self)), strict=True):
            with _opened(self.files, self.files.names[self.file[begin]]) as file:
                captions = (
                    file.read_row_group(int(self.group[begin]), columns=[self.columns.caption]).column(0).to_pylist()
                )
            keys[begin:end] = [caption_key(captions[row] or "") for row in self.row[begin:end]]
        return keys


def open_parquet(files: Files, data: Data, kind: str = "auto") -> ParquetSource:
    """Scans the files and indexes their usable pairs (the first data.max_pairs of them).

    kind: see `find_columns`. Raises UserError for unreadable files, missing columns and captions or labels of a wrong
    type.
    """
    with _opened(files, files.names[0]) as file:
        schema = file.schema_arrow
    columns = find_columns(schema.names, data, files.names[0], kind)
    text = schema.field(columns.caption).type
    text = text.value_type if pa.types.is_dictionary(text) else text
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise UserError(f"{files.names[0]}: the captions in {columns.caption} are {text}, not text")
    parts: list[tuple[np.ndarray, ...]] = []
    counts: dict[str, int] = {}
    sizes: list[int] = []
    scanned: list[str] = []
    total = 0
    for number, (name, scan) in enumerate(_scans(files, columns, data.ties)):
        keep = np.flatnonzero(scan.labels.keep)
        if data.max_pairs is not None:
            keep = keep[: data.max_pairs - total]
        rows = np.array(scan.group_rows, dtype=np.int64)
        group = np.repeat(np.arange(len(rows)), rows)[keep]
        row = keep - (np.cumsum(rows) - rows)[group]
        labels = scan.labels
        parts.append((np.full(len(keep), number), group, row, labels.swap[keep], labels.prob[keep], len(sizes) + group))
        sizes += scan.group_bytes
        counts = {key: counts.get(key, 0) + value for key, value in labels.counts.items()}
        scanned.append(f"{name}:{scan.group_rows}:{scan.group_bytes}")
        total += len(keep)
        if total == data.max_pairs:
            break
    file, group, row, swap, prob, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
    window, kept = _window([sizes[number] for number in np.unique(groups)])
    return ParquetSource(
        files=files,
        columns=columns,
        smoothing=data.label_smoothing,
        file=file.astype(np.int32),
        group=group.astype(np.int32),
        row=row.astype(np.int32),
        swap=swap,
        prob=prob,
        groups=groups.astype(np.int32),
        window=window,
        kept=kept,
        summary=counts | {"pairs": total},
        fingerprint=digest(
            *scanned, repr(columns), data.ties, str(data.max_pairs), swap.tobytes().hex(), prob.tobytes().hex()
        ),
    )


def _scans(files: Files, columns: Columns, ties: str) -> Iterator[tuple[str, _Scan]]:
    """(name, scan) of every file in order; SCANNERS files are scanned at a time."""
    with ThreadPoolExecutor(SCANNERS) as pool:
        for begin in range(0, len(files.names), SCANNERS):
            names = files.names[begin : begin + SCANNERS]
            yield from zip(names, pool.map(lambda name: _scan(files, name, columns, ties), names), strict=True)


def _window(sizes: list[int]) -> tuple[int | None, int]:
    """Row groups in use at once (None: all of them) and row groups kept in memory, from their sizes in bytes."""
    if sum(sizes) <= WINDOW_BYTES:
        return None, max(1, len(sizes))
    mean = sum(sizes) / len(sizes)
    window = max(2, int(WINDOW_BYTES / mean))
    if window * mean > 2 * WINDOW_BYTES:
        logger.warning(
            "the parquet row groups hold %.1f GiB each: reading takes %.1f GiB of memory; smaller row groups need less",
            mean / 1024**3, (window + 1) * mean / 1024**3,
        )  # fmt: skip
    return window, window + 1

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import OF_READING, UserError, reading
from dpo.common.words import digest, first_line, listed
from dpo.data.arrow import check_schema
from dpo.data.labels import BLANK, SAME, Columns, RowLabels, find_columns, labels_of, with_more
from dpo.data.listing import NOT_READ
from dpo.data.pairs import Pair, Source, caption_key, image_ref, make_pair, one_image
from dpo.settings.config import Data

WINDOW_BYTES = 2 * 1024**3  # of row groups in use at once; another value changes the order of an epoch
SAID_BYTES = 2**28  # what takes longer than seconds to read over a network is said
SCANNERS, AT_ONCE = 8, 256  # files opened side by side, and pairs that a thread compares at a time

# What reading a damaged file raises: columns of different lengths end in the last two.
DAMAGED = (pa.ArrowException, *OF_READING, IndexError, StopIteration)

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
    blank: np.ndarray  # [rows] bool: no caption
    group_rows: list[int]
    group_bytes: list[int]


def _scan(files: Files, name: str, columns: Columns, ties: str) -> _Scan:
    with _opened(files, name) as file:
        missing = [c for c in columns.read + columns.decided_by if c not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{name}: column {missing[0]} is missing, found {listed(file.schema_arrow.names)}")
        wider = with_more(columns, file.schema_arrow.names).decided_by
        if more := [c for c in wider if c not in columns.decided_by]:
            raise UserError(
                f"{name}: has a column {more[0]}, which other files of the set lack: name the files of one kind"
            )
        check_schema(file.schema_arrow, columns, name)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        small = file.read(columns=columns.decided_by) if columns.decided_by else None
        blank = _blank(file, columns.caption)
    table = {c: small.column(c).to_numpy(zero_copy_only=False) for c in columns.decided_by} if small is not None else {}
    rows = sum(group.num_rows for group in groups)
    labels = labels_of(table, columns, rows, ties, name)
    return _Scan(
        labels, blank, [group.num_rows for group in groups], [_bytes_of(group, columns.read) for group in groups]
    )


def _blank(file: pq.ParquetFile, caption: str) -> np.ndarray:
    """[rows] bool: captions that are null or empty. They are read only where the file's statistics admit one."""
    blank = []
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        told = next(
            group.column(j).statistics for j in range(group.num_columns) if group.column(j).path_in_schema == caption
        )
        if told is not None and told.has_null_count and not told.null_count and told.has_min_max and told.min:
            blank.append(np.zeros(group.num_rows, dtype=bool))
        else:
            texts = file.read_row_group(i, columns=[caption]).column(0).to_pylist()
            blank.append(np.array([not text for text in texts], dtype=bool))
    return np.concatenate([np.empty(0, dtype=bool), *blank])


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
        except DAMAGED as error:
            raise self._unreadable(error) from error
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close(force=True)
        if isinstance(error, DAMAGED):
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

        root, name = self.root(index), self.files.names[self.file[index]]
        with reading(f"{name}, row {row} of row group {self.group[index]}", "fetch it again or leave it out"):
            first = image_ref(cell(columns.first), cell(columns.uid_0), root)
            second = image_ref(cell(columns.second), cell(columns.uid_1), root) if columns.second else None
            caption = cell(columns.caption) or ""
        swap, prob = bool(self.swap[index]), float(self.prob[index])
        return make_pair(caption, first, second, swap, prob, self.smoothing)

    @property
    def sides(self) -> int:
        return len(self.columns.images)

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

    def root(self, index: int) -> str | None:
        """The folder that paths in a pair's cells are relative to; None on the hub."""
        return self.files.root and str(Path(self.files.root, self.files.names[self.file[index]]).parent)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The first pair of each row group, and the one after its last."""
        starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        yield from zip(starts.tolist(), np.append(starts[1:], len(self)).tolist(), strict=True)

    def caption_keys(self) -> np.ndarray:
        """[n] int64 hashes of the captions; reads that column only."""
        keys = np.empty(len(self), dtype=np.int64)
        for begin, end in self.runs():
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
        parts.append(
            (
                np.full(len(keep), number), group, row, labels.swap[keep], labels.prob[keep], len(sizes) + group,
                scan.blank[keep],
            )
        )  # fmt: skip
        sizes += scan.group_bytes
        counts = {key: counts.get(key, 0) + value for key, value in labels.counts.items()}
        scanned.append(f"{name}:{scan.group_rows}:{scan.group_bytes}")
        total += len(keep)
        if total == data.max_pairs:
            break
    file, group, row, swap, prob, groups, blank = (np.concatenate(column) for column in zip(*parts, strict=True))
    window, kept = _window([sizes[number] for number in np.unique(groups)])
    counts = counts | {BLANK: int(blank.sum()), "pairs": total}
    if left := len(files.names) - len(scanned):
        counts[NOT_READ + "beyond --max-pairs"] = left
    source = ParquetSource(
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
        summary=counts,
        fingerprint=digest(
            *scanned, repr(columns), data.ties, str(data.max_pairs), swap.tobytes().hex(), prob.tobytes().hex()
        ),
    )
    named = columns.second is None or (columns.uid_0 is not None and columns.uid_1 is not None)
    return source if named or window is not None else _without_one_image_twice(source, blank, sum(sizes))


def read_in_order(source: Source) -> Source:
    """`source` for a reader that takes its pairs from the first to the last: two row groups stay in memory, not all."""
    return replace(source, kept=2, cache=OrderedDict()) if isinstance(source, ParquetSource) else source


def _without_one_image_twice(source: ParquetSource, blank: np.ndarray, total: int) -> ParquetSource:
    """The pairs whose images differ, of a set that is kept in memory, of `total` bytes; blank [n]: which have no caption.

    Its images are read for this, and not kept. `read_labels` has compared the images where a set names them; of a set
    too large to be kept in memory such pairs become holes when they are read.
    """
    if total > SAID_BYTES:
        logger.info("looking for pairs of one image twice in %.1f GiB", total / 1024**3)
    same = np.concatenate([np.empty(0, dtype=bool), *(_alike(source, *ends) for ends in source.runs())])
    if not same.any():
        return source
    keep, counts = ~same, source.summary
    return replace(
        source, file=source.file[keep], group=source.group[keep], row=source.row[keep], swap=source.swap[keep],
        prob=source.prob[keep], groups=source.groups[keep], fingerprint=digest(source.fingerprint, keep.tobytes().hex()),
        summary=counts | {
            SAME: counts.get(SAME, 0) + int(same.sum()), BLANK: int(blank[keep].sum()), "pairs": int(keep.sum())
        },
    )  # fmt: skip


def _alike(source: ParquetSource, begin: int, end: int) -> np.ndarray:
    """[end - begin] bool: of the pairs of one row group, those whose two images are one."""
    names = source.columns.images
    with _opened(source.files, source.files.names[source.file[begin]]) as file:
        table = file.read_row_group(int(source.group[begin]), columns=names)
        root = source.root(begin)

        def alike(rows: np.ndarray) -> list[bool]:
            cells = ((table.column(name)[row].as_py() for name in names) for row in rows.tolist())
            return [one_image(*(image_ref(cell, None, root) for cell in pair)) for pair in cells]

        rows = source.row[begin:end]
        with ThreadPoolExecutor(SCANNERS) as pool:  # where cells are paths, each costs a look at two files
            parts = pool.map(alike, (rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)))
            return np.array([same for part in parts for same in part], dtype=bool)


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

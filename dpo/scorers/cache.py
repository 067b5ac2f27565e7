"""Scores that were computed before, by image, scorer and caption, in one SQLite file.

Two processes may share the file, and a kill loses at most the batch that was being written.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import excerpt, first_line, listed

TAKEN = 4096  # rows copied at a time
WAIT = 30.0  # seconds for another process's write
BYTES = np.dtype("<f4")  # of a feature
TABLES: dict[str, type] = {"scores": float, "features": bytes}  # and what their values are
MAKE = {
    "scores": "(key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID",
    "features": "(key BLOB PRIMARY KEY, value BLOB NOT NULL)",
}
REMEDIES = {  # by what SQLite says; otherwise the file is damaged, or not ours
    "attempt to write a readonly database": "let it be written, or name another --output",
    "unable to open database file": "let its folder be written, or name another --output",
    "database or disk is full": "free some space, then start the same command again",
    "database is locked": "wait until the other process ends",
}
REMEDY = "delete it or name another --output"


class ScoreCache:
    """The scores in a file, which is made where it is missing; a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is no such cache: another program's database stays as it is."""
        self._lock = threading.Lock()
        self._path = path
        with self._usable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=WAIT, check_same_thread=False, isolation_level=None)
            try:
                names = {str(name) for (name,) in self._base.execute("SELECT name FROM sqlite_master")}
                if others := sorted(name for name in names - TABLES.keys() if not name.startswith("sqlite_")):
                    raise ValueError(f"it is another program's, with {listed(others)}")
                for table in (
                    TABLES.keys() & names
                ):  # before anything is made: one of these names may be another program's
                    self._base.execute(f"SELECT key, value FROM {table} LIMIT 1").fetchone()
                for table, made in MAKE.items():
                    self._base.execute(f"CREATE TABLE IF NOT EXISTS {table} {made}")
            except BaseException:
                self._base.close()
                raise

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Around every use: what is wrong with the file becomes a UserError."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            why = first_line(error)
            remedy = REMEDIES.get(why, REMEDY)
            raise UserError(f"{self._path} cannot be used as a cache of scores ({why}); {remedy}") from error

    def get(self, image: str, scorer: str, caption: str) -> float | None:
        """The score of an image (its hash) by a scorer (its fingerprint) with a caption; None where it is not known.

        Raises UserError for a damaged file.
        """
        return self._get("scores", _key(image, scorer, caption))

    def put(self, scorer: str, scores: Sequence[tuple[str, str, float]]) -> None:
        """Keeps scores (image's hash, caption, value) of one scorer, all of them or none. Raises UserError."""
        self._put("scores", ((_key(image, scorer, caption), value) for image, caption, value in scores))

    def get_features(self, image: str, scorer: str) -> np.ndarray | None:
        """The features float32 [D] of an image (its hash) by a scorer (its fingerprint); None where they are not known.

        Raises UserError for a damaged file.
        """
        found = self._get("features", _key(image, scorer))
        with self._usable():
            return None if found is None else np.frombuffer(found, BYTES).astype(np.float32)

    def put_features(self, scorer: str, features: Sequence[tuple[str, np.ndarray]]) -> None:
        """Keeps features (image's hash, float32 [D]) of one scorer, all of them or none. Raises UserError."""
        self._put("features", ((_key(image, scorer), value.astype(BYTES).tobytes()) for image, value in features))

    def take(self, path: Path) -> int:
        """Copies every score and feature of another cache's file into this one; how many there are. Raises UserError."""
        if not path.is_file():
            raise UserError(f"{path}: no scores are there; name a folder that --shard scored into")
        count = 0
        with ScoreCache(path) as other:
            for table in MAKE:
                with other._usable():
                    rows = other._base.execute(f"SELECT key, value FROM {table}")
                    while part := rows.fetchmany(TAKEN):
                        self._put(table, part)
                        count += len(part)
        return count

    def _get(self, table: str, key: bytes) -> Any:
        with self._lock, self._usable():
            found = self._base.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
            if found is not None and not isinstance(found[0], TABLES[table]):
                raise ValueError(f"of {table} it has {excerpt(found[0])}")
        return None if found is None else found[0]

    def _put(self, table: str, rows: Iterable[tuple[bytes, float | bytes]]) -> None:
        kept = list(rows)
        with self._lock, self._usable():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", kept)
                self._base.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk may have ended the transaction already
                    self._base.execute("ROLLBACK")
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()


def _key(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()

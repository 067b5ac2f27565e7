"""Scores that were computed before, by image, scorer and caption, and features by image and scorer, in one SQLite file.

Two processes may share the file, and a kill loses at most the batch that was being written.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dpo.common.errors import UserError

WAIT = 30.0  # seconds for another process's write
BYTES = np.dtype("<f4")  # of a feature


class ScoreCache:
    """The scores in a file, which is made where it is missing; a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is no such cache."""
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=WAIT, check_same_thread=False, isolation_level=None)
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
            )
            self._base.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
            for table in ("scores", "features"):
                self._base.execute(f"SELECT key, value FROM {table} LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path} cannot be used as a cache of scores ({error}); delete it") from error

    def get(self, image: str, scorer: str, caption: str) -> float | None:
        """The score of an image (its hash) by a scorer (its fingerprint) with a caption; None where it is not known."""
        found = self._get("scores", _key(image, scorer, caption))
        return None if found is None else float(found)

    def put(self, scorer: str, scores: Sequence[tuple[str, str, float]]) -> None:
        """Keeps scores (image's hash, caption, value) of one scorer, all of them or none."""
        self._put("scores", ((_key(image, scorer, caption), value) for image, caption, value in scores))

    def get_features(self, image: str, scorer: str) -> np.ndarray | None:
        """The features float32 [D] of an image (its hash) by a scorer (its fingerprint); None where they are not known."""
        found = self._get("features", _key(image, scorer))
        return None if found is None else np.frombuffer(found, BYTES).astype(np.float32)

    def put_features(self, scorer: str, features: Sequence[tuple[str, np.ndarray]]) -> None:
        """Keeps features (image's hash, float32 [D]) of one scorer, all of them or none."""
        self._put("features", ((_key(image, scorer), value.astype(BYTES).tobytes()) for image, value in features))

    def _get(self, table: str, key: bytes) -> Any:
        with self._lock:
            found = self._base.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
        return None if found is None else found[0]

    def _put(self, table: str, rows: Iterable[tuple[bytes, float | bytes]]) -> None:
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", rows)
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()


def _key(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()

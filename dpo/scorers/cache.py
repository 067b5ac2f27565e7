"""Scores that were computed before, by image, scorer and caption, in one SQLite file.

Two processes may share the file, and a kill loses at most the batch that was being written.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dpo.common.errors import UserError

WAIT = 30.0  # seconds for another process's write


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
            self._base.execute("SELECT key, value FROM scores LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path} cannot be used as a cache of scores ({error}); delete it") from error

    def get(self, image: str, scorer: str, caption: str) -> float | None:
        """The score of an image (its hash) by a scorer (its fingerprint) with a caption; None where it is not known."""
        with self._lock:
            found = self._base.execute(
                "SELECT value FROM scores WHERE key = ?", (_key(image, scorer, caption),)
            ).fetchone()
        return None if found is None else float(found[0])

    def put(self, scorer: str, scores: Sequence[tuple[str, str, float]]) -> None:
        """Keeps scores (image's hash, caption, value) of one scorer, all of them or none."""
        rows = [(_key(image, scorer, caption), value) for image, caption, value in scores]
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
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


def _key(image: str, scorer: str, caption: str) -> bytes:
    return hashlib.sha256("\0".join([image, scorer, caption]).encode("utf-8", "surrogatepass")).digest()

"""Votes as preference pairs that dpo.train reads."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path, output: Path, question: str | None = None, *, layout: str = "pickapic") -> list[str]:
    """Writes the votes of one question as a parquet file of preference pairs; lines on what was written.

    folder: of the study. output: the file, or a folder, which gets `votes.parquet`. question: its key; None: the only
    question, or the first. layout: "pickapic" or "chosen-rejected". Raises UserError.
    """
    raise NotImplementedError

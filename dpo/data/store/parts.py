"""What the parts of a store say together: how their pairs are read, and what was found and left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.labels import SAME_BYTES, UNREADABLE
from dpo.data.store.files import INDEX, NOWHERE, TWICE, read_index


def of_order(
    parts: Sequence[tuple[Path, Mapping[str, Any]]], group: np.ndarray
) -> tuple[np.ndarray | None, int | None]:
    """`groups` and `window` of the source, which decide the order of an epoch; (None, None) for several sources."""
    sources = [source for _, part in parts for source in part["sources"]]
    if len({source["fingerprint"].split(":")[0] for source in sources}) != 1 or not sources[0]["groups"]:
        return None, None
    return group, sources[0]["window"]


def counted(parts: Sequence[tuple[Path, Mapping[str, Any]]], win: np.ndarray, lose: np.ndarray) -> dict[str, int]:
    """The counts of all sources, summed; a source that was cut into parts counts once. And those of the holes."""
    summaries = {
        source["fingerprint"].split(":")[0]: source["summary"] for _, part in parts for source in part["sources"]
    }
    total: dict[str, int] = {}
    for summary in summaries.values():
        total |= {name: total.get(name, 0) + count for name, count in summary.items()}
    holes = {UNREADABLE: np.sum((win == NOWHERE) | (lose == NOWHERE)), SAME_BYTES: np.sum(win == TWICE)}
    return total | {name: int(count) for name, count in holes.items() if count}


def has_buckets(folder: Path) -> bool:
    """Whether a folder is a store whose images have several shapes. Raises UserError where it is damaged."""
    if not (folder / INDEX).is_file():
        return False
    index = read_index(folder) or {}
    if parts := index.get("parts"):
        index = read_index(folder / parts[0]["path"]) or {}
    return bool(index.get("settings", {}).get("buckets"))

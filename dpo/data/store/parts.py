"""What the parts of a store say together: how their pairs are read, what was found and left out; where their index may be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.data.labels import SAME_BYTES, UNREADABLE
from dpo.data.store.files import INDEX, NOT_ALWAYS, NOWHERE, ROUNDING, TWICE, UNNAMED, read_index

log = logging.getLogger("dpo")


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


def check_alike(parts: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Raises UserError where parts were not prepared alike. A setting that one of them lacks is another one."""
    where_first, first = parts[0][0], UNNAMED | parts[0][1]["settings"]
    for where, part in parts:
        own = UNNAMED | part["settings"]
        for name in first | own:
            both = first.get(name), own.get(name)
            if both[0] != both[1] and not (name in NOT_ALWAYS and None in both):
                raise UserError(
                    f"{where} and {where_first} differ in {name}: parts of one store must be prepared alike"
                )


def check_labels(
    folder: Path, parts: Sequence[tuple[Path, Mapping[str, Any]]], order: np.ndarray, key: np.ndarray, prob: np.ndarray
) -> None:
    """Raises UserError where parts hold a pair, or an image without a partner, of two sources with different labels.

    order [m] int64: rows of key [n] int64 and prob [n] fp32. Of those with the same label the log says how many there are: one
    store would leave them out, and in parts each counts.
    """
    names: dict[str, str] = {}  # by fingerprint, in the order of the parts
    places = list[int]()
    for _, part in parts:
        for entry in part["shards"]:
            source = part["sources"][entry["source"]]
            own = source["fingerprint"].split(":")[0]
            names.setdefault(own, source["name"])
            places += [list(names).index(own)] * entry["pairs"]
    source_n = np.array(places, dtype=np.int64)[order]
    key, prob = key[order], prob[order]
    each, counts = np.unique(np.unique(np.stack([key, source_n]), axis=1)[0], return_counts=True)
    rows = np.flatnonzero(np.isin(key, each[counts > 1]))
    held: dict[int, list[tuple[int, float]]] = {}
    again = 0
    for row in rows[np.argsort(source_n[rows], kind="stable")].tolist():
        own, label, earlier = int(source_n[row]), float(prob[row]), held.setdefault(int(key[row]), [])
        before = [one for place, one in earlier if place < own]
        if before and min(abs(one - label) for one in before) > ROUNDING:
            first, second = (list(names.values())[place] for place in (earlier[0][0], own))
            raise UserError(
                f"{folder}: {second} has pairs of {first} with another label: prepare one of them into another --store"
            )
        again += bool(before)
        earlier.append((own, label))
    if again:
        log.warning("%s: %s of one set are in another one too, and count twice", folder, number_of(again, "pairs"))


def check_place(folder: Path) -> None:
    """Raises UserError where `folder` has pairs of its own, finished or not: an index over parts would replace theirs."""
    if "parts" not in (read_index(folder) or {"parts": []}):
        raise UserError(
            f"{folder} is a prepared store of its own, whose index would be lost: name a new --store, and all stores after --merge"
        )


def has_buckets(folder: Path) -> bool:
    """Whether a folder is a store whose images have several shapes. Raises UserError where it is damaged."""
    if not (folder / INDEX).is_file():
        return False
    index = read_index(folder) or {}
    if parts := index.get("parts"):
        index = read_index(folder / parts[0]["path"]) or {}
    return bool(index.get("settings", {}).get("buckets"))

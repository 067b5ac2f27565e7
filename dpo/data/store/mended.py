"""Pairs that are holes of a store because an image was unreadable, and those that stand for them since it was mended.

The shards of a store are never changed. Pairs whose images are readable at a later call lie in a shard of their own,
and its entry of the index says for which rows they stand ("instead"). Entries say too what the files of the unreadable
images were ("bad_files") and became ("mended"), by the images' hashes: so much may differ from what was prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.contents import stamps, state
from dpo.data.pairs import ImageRef, Source, Subset
from dpo.data.store.files import NOWHERE, open_shard
from dpo.data.store.known import image_key

Entries = Sequence[Mapping[str, Any]]  # of the shards of one folder, as the index has them


def holes(folder: Path, entries: Entries) -> dict[int, list[int]]:
    """The rows, in order, of the pairs with an unreadable image for which no later row stands, by the pairs' keys."""
    found: dict[int, list[int]] = {}
    begin, filled = 0, {row for entry in entries for row in entry.get("instead", ())}
    for entry in entries:
        shard = open_shard(folder / entry["file"])
        unreadable = (shard["pair_win"] == NOWHERE) | (shard["pair_lose"] == NOWHERE)
        for at in unreadable.nonzero().flatten().tolist():
            if begin + at not in filled:
                found.setdefault(int(shard["pair_key"][at]), []).append(begin + at)
        begin += entry["pairs"]
    return found


def in_order(parts: Sequence[Entries]) -> np.ndarray:
    """[n] int64: the rows of the pairs in the order of the data, each mended pair in the place of its hole."""
    order = np.arange(sum(entry["pairs"] for entries in parts for entry in entries))
    kept = np.ones(len(order), dtype=bool)
    first = begin = 0  # rows before this part, before this shard
    for entries in parts:
        for entry in entries:
            end = begin + entry["pairs"]
            if "instead" in entry:
                order[first + np.array(entry["instead"], dtype=np.int64)] = np.arange(begin, end)
                kept[begin:end] = False
            begin = end
        first = begin
    return order[kept]


def as_found(entries: Entries) -> Callable[[ImageRef], tuple[int, str] | None]:
    """A function from an image to what its file was when it was unreadable; None for the others.

    None too for an image that was changed again after it was mended.
    """
    bad: dict[str, list[Any]] = {}
    mended: dict[str, list[Any]] = {}
    for entry in entries:
        bad |= entry.get("bad_files", {})
        mended |= entry.get("mended", {})

    def was(image: ImageRef) -> tuple[int, str] | None:
        key = str(image_key(image)) if bad else ""
        if key not in bad or (key in mended and mended[key] != list(state(image))):
            return None
        return bad[key][0], bad[key][1]

    return was


def stamp(source: Source, first: int, last: int, entries: Entries) -> dict[str, str | None]:
    """What an index says of the image files of the pairs first..last-1, with the unreadable ones as they were found."""
    whole = (first, last) == (0, len(source))
    pairs = source if whole else Subset(source, np.arange(first, last))
    return {"images" if whole else "images_of_part": stamps(pairs, as_found(entries)).get("images")}


def same_files(before: Mapping[str, Any], source: Source, first: int, last: int, entries: Entries) -> bool:
    """Whether the image files are those of the `stamp` in `before`, but for the unreadable ones, as far as it says.

    Earlier versions stamped all of the source in each of its parts, or nothing, and did not say which were unreadable.
    """
    ((name, found),) = stamp(source, first, last, entries).items()
    if before.get(name) is not None:
        return before[name] == found
    return before.get("images") in (None, stamps(source, as_found(entries)).get("images"))

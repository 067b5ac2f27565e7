"""What a store that is being filled holds already: rows of images and captions by hash, and keys of pairs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.images import Size
from dpo.data.pairs import ImageRef
from dpo.data.store.files import NOWHERE, check_shard, open_shard


def image_key(image: ImageRef, size: Size | None = None) -> int:
    """A signed 64-bit hash of an image's path (and place in that file), or of its uid where it has no path.

    size: the shape that it is cut to; None for the square.
    """
    # realpath: of a link to itself Path.resolve raises
    name = f"path\0{os.path.realpath(image.path)}" if image.path is not None else f"uid\0{image.uid}"
    name += f"\0{image.span[0]}" if image.span else ""
    name += "\0{} x {}".format(*size) if size else ""
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
    )


class Known:
    """A map from hash to row, in sorted arrays of 16 bytes an entry; new entries go to `recent`."""

    def __init__(self) -> None:
        self.keys = np.empty(0, dtype=np.int64)
        self.rows = np.empty(0, dtype=np.int64)
        self.recent: dict[int, int] = {}

    def get(self, key: int) -> int | None:
        if key in self.recent:
            return self.recent[key]
        at = int(np.searchsorted(self.keys, key))
        return int(self.rows[at]) if at < len(self.keys) and self.keys[at] == key else None

    def row(self, key: int) -> int:
        """The row of a hash that is in the map."""
        found = self.get(key)
        assert found is not None
        return found

    def settle(self) -> None:
        """Moves what was added since the last call to the sorted arrays; an entry of the same hash is hidden by it."""
        keys = np.array(sorted(self.recent), dtype=np.int64)
        rows = np.array([self.recent[key] for key in keys.tolist()], dtype=np.int64)
        at = np.searchsorted(self.keys, keys)
        self.keys, self.rows, self.recent = np.insert(self.keys, at, keys), np.insert(self.rows, at, rows), {}

    def usable(self) -> Known:
        """The settled entries that have a row: what is unreadable is unknown there, and so is tried again."""
        found, kept = Known(), self.rows >= 0
        found.keys, found.rows = self.keys[kept], self.rows[kept]
        return found


class AlreadyStored:
    """Pairs that a store already holds, counted by key, so that a set that grew adds only its new pairs."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.left = np.unique(keys, return_counts=True)

    def has(self, key: int) -> bool:
        """Whether the store holds one more pair of this key; each pair is counted off once."""
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key or not self.left[at]:
            return False
        self.left[at] -= 1
        return True

    def pass_over(self, keys: Iterator[int]) -> None:
        for key in keys:
            self.has(key)


def known(folder: Path, index: Mapping[str, Any]) -> tuple[Known, Known, np.ndarray, int]:
    """From the shards so far: rows of images, rows of captions, keys of earlier sources' pairs, number of images."""
    images, captions, pairs, next_image, next_caption = Known(), Known(), [np.empty(0, dtype=np.int64)], 0, 0
    for entry in index["shards"]:
        check_shard(folder / entry["file"], entry)
        shard = open_shard(folder / entry["file"])
        images.recent |= dict.fromkeys(shard["bad_key"].tolist(), NOWHERE)
        if entry["images"]:
            images.recent |= {key: next_image + i for i, key in enumerate(shard["image_key"].tolist())}
        if entry["captions"]:
            captions.recent |= {key: next_caption + i for i, key in enumerate(shard["caption_key"].tolist())}
        next_image, next_caption = next_image + entry["images"], next_caption + entry["captions"]
        if entry["source"] < len(index["sources"]) - 1 and "instead" not in entry:  # those are counted as holes
            pairs.append(shard["pair_key"].numpy().copy())
        images.settle()
        captions.settle()
    return images, captions, np.concatenate(pairs), next_image

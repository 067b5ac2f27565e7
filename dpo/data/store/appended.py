"""What a source that is new to a store shares with it: the same pairs under other labels, or other images under their names.

A pair counts as stored where its key is, a hash of its images' uids and its caption. The uid of a file is the relative text
that names it: images in another folder can have the same, and so have those that were drawn anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.data.contents import stamps
from dpo.data.pairs import Pair, Subset, embedded_twice, things
from dpo.data.parquet import read_in_order
from dpo.data.store.files import ROUNDING, check_shard, open_shard, read_index
from dpo.data.store.filling import Filling
from dpo.data.store.known import AlreadyStored, Known, image_key
from dpo.data.store.mended import as_found

Entry = tuple[Path, Mapping[str, Any]]  # of a shard: its file, and what the index says of it

log = logging.getLogger("dpo")


def check_appended(task: Filling, index: Mapping[str, Any], images: Known) -> None:
    """Raises UserError where the store holds pairs of the new source with other labels, or with images that were others.

    Pairs that it holds the other way round have other keys, and may be another person's answer: that is said. Of the source
    only what has a caption of the store is read. index: with the new source as its last; images: those of the store.
    """
    own = [(task.folder / entry["file"], entry) for entry in index["shards"]]
    held: dict[int, list[float]] = {}  # one may be there several times
    captions: list[int] = []
    stored = set[int]()  # a part beside has pairs of its own, which this store takes too
    for path, entry in own + _beside(task):
        check_shard(path, entry)
        shard = open_shard(path)
        captions += shard["caption_key"].tolist() if entry["captions"] else []
        keys = shard["pair_key"].tolist()
        for key, prob in zip(keys, shard["pair_prob"].tolist(), strict=True):
            held.setdefault(key, []).append(prob)
        stored.update(keys if path.parent == task.folder else ())
    if not held:
        return
    source = read_in_order(task.source)
    shared = task.first + np.flatnonzero(np.isin(source.caption_keys()[task.first : task.end], captions))
    other = turned = elsewhere = 0
    again: list[tuple[int, int, bool]] = []  # pairs that count as stored: place in the source, key, whether in files
    for i in shared.tolist():
        pair, prob = source[i], float(source.prob[i])
        other += pair.key in held and min(abs(one - prob) for one in held[pair.key]) > ROUNDING
        turned += pair.key not in held and pair.turned_key() in held
        if pair.key in stored:
            elsewhere += not _known(pair, task, images)
            again.append((i, pair.key, any(image.path is not None for image in pair.images)))
    if other:
        raise UserError(
            f"{task.folder} holds {other} of the {things(source)} of {task.name} with another label: prepare them into another "
            "--store"
        )
    if elsewhere:
        raise UserError(
            f"{task.folder} holds {elsewhere} of the {things(source)} of {task.name} by their names and captions, but their images lay "
            "elsewhere: prepare other images into another --store, and both stores make one with --merge; where it is the same set, "
            "move it back, or prepare all of it anew"
        )
    if again and source.groups is None:  # others lie inside of larger files, with an identity of their own
        _check_files(task, index, *map(np.array, zip(*again, strict=True)))
    if turned:
        log.warning(
            "%s holds %d of the pairs of %s the other way round, and keeps both: where labels were mended, prepare them into another "
            "--store",
            task.folder, turned, task.name,
        )  # fmt: skip


def other_files(task: Filling) -> UserError:
    return UserError(
        f"{task.folder} was prepared from other image files than {task.name} has now under the same names: "
        "prepare them into another --store"
    )


def _check_files(
    task: Filling, index: Mapping[str, Any], at: np.ndarray, keys: np.ndarray, in_files: np.ndarray
) -> None:
    """Raises UserError where the files of an earlier source changed, all of whose pairs are in the new one in their order.

    at [n] int64: places in the new source of pairs that the store holds; their keys [n] int64, whether they are files [n] bool.
    A warning says how many of them could not be compared. An index has one stamp of the files of a source, and not one of
    each: it tells nothing where a pair is missing, or lies in the share of another process now. That process alone reads
    it: looked for here, every part would read the whole source.
    """
    compared = np.zeros(len(keys), dtype=bool)
    stored = np.empty(0, dtype=np.int64)
    was = as_found(index["shards"])
    for number, before in enumerate(index["sources"][:-1]):
        shards = [entry for entry in index["shards"] if entry["source"] == number and "instead" not in entry]
        own = [open_shard(task.folder / entry["file"])["pair_key"].numpy() for entry in shards]
        own_n = np.concatenate([np.empty(0, dtype=np.int64), *own])
        stored = np.concatenate([stored, own_n])
        first, last = map(int, before["fingerprint"].split(":")[-2:])
        # Earlier versions stamped all of a set in each of its parts.
        whole = first == 0 and last == before["summary"].get("pairs")
        files = before.get("images_of_part") or (before.get("images") if whole else None)
        # All pairs are known of a source of which the store had none, and of one that had all of the store's; where its own
        # stood among those is taken from the new source.
        every = own_n if len(own_n) == last - first else stored
        if files is None or len(every) != last - first:
            continue
        left = AlreadyStored(every)
        here = np.array([left.has(key) for key in keys.tolist()])
        found = keys[here]
        if len(found) < len(every) or not np.array_equal(found[np.isin(found, own_n)], own_n):
            continue
        if stamps(Subset(task.source, at[here]), was).get("images") != files:
            raise other_files(task)
        compared |= here
    if unknown := int(np.sum(in_files & ~compared)):
        log.warning(
            "%s: %s of %s count as stored, and whether their image files changed cannot be told: pairs were taken out, moved or "
            "prepared in other parts; where images were drawn anew, prepare them into another --store",
            task.folder, number_of(unknown, things(task.source)), task.name,
        )  # fmt: skip


def _beside(task: Filling) -> list[Entry]:
    """The shards of the parts beside, but those of the task's own source."""
    found: list[Entry] = []
    for part in task.beside:
        index = read_index(part) or {"shards": []}
        mine = f"{task.source.fingerprint}:"
        found += [
            (part / entry["file"], entry)
            for entry in index["shards"]
            if not index["sources"][entry["source"]]["fingerprint"].startswith(mine)
        ]
    return found


def _known(pair: Pair, task: Filling, images: Known) -> bool:
    """Whether the store knows all images of a pair, in whatever shape: what was unreadable is known without one."""
    cut = [None, *(size for size in task.sizes if size[0] != size[1])]
    return embedded_twice(pair) or all(
        any(images.get(image_key(image, size)) is not None for size in cut) for image in pair.images
    )

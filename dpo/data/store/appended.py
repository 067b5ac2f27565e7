"""What a source that is new to a store shares with it: the same pairs under other labels, or other images under their names.

A pair counts as stored where its key is, a hash of its images' uids and its caption. The uid of a file is the relative text
that names it: images in another folder can have the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo.common.errors import UserError
from dpo.data.pairs import Pair, embedded_twice, things
from dpo.data.parquet import read_in_order
from dpo.data.store.files import ROUNDING, check_shard, open_shard, read_index
from dpo.data.store.filling import Filling
from dpo.data.store.known import Known, image_key

Entry = tuple[Path, Mapping[str, Any]]  # of a shard: its file, and what the index says of it

log = logging.getLogger("dpo")


def check_appended(task: Filling, index: Mapping[str, Any], images: Known) -> None:
    """Raises UserError where the store holds pairs of the new source with other labels, or with images that lay elsewhere.

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
    for i in shared.tolist():
        pair, prob = source[i], float(source.prob[i])
        other += pair.key in held and min(abs(one - prob) for one in held[pair.key]) > ROUNDING
        turned += pair.key not in held and pair.turned_key() in held
        elsewhere += pair.key in stored and not _known(pair, task, images)
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
    if turned:
        log.warning(
            "%s holds %d of the pairs of %s the other way round, and keeps both: where labels were mended, prepare them into another "
            "--store",
            task.folder, turned, task.name,
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

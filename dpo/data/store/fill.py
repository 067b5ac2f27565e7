"""Filling a prepared store: every image of a source encoded once, every caption once, in shards of so many pairs each.

A shard holds its pairs and those images and captions that no earlier shard has. It is one file, so that a kill costs
the work on one shard. The rows of images and captions in earlier shards are read back from them and kept in memory, 16
bytes each. Pairs that were left out for an unreadable image are tried again: see mended.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import excerpt
from dpo.data import labelled
from dpo.data.ahead import read_ahead
from dpo.data.buckets import of_pair
from dpo.data.contents import state
from dpo.data.images import STOPPED, Micro, Size, check_bad, fitted, unreadable
from dpo.data.labels import SAME
from dpo.data.pairs import BadImage, ImageRef, Pair, caption_key, embedded_twice
from dpo.data.store.appended import check_appended, other_files
from dpo.data.store.files import (
    NOT_ALWAYS,
    NOWHERE,
    TWICE,
    UNNAMED,
    read_index,
    sweep_away,
    tables_crc,
    write_index,
    write_shard,
)
from dpo.data.store.filling import Filling
from dpo.data.store.known import AlreadyStored, Known, image_key, known
from dpo.data.store.mended import holes, in_order, same_files, stamp
from dpo.data.store.shard import PairRow, Shard

READ_AHEAD = 64  # pairs read before their turn
log = logging.getLogger("dpo")


def fill(task: Filling) -> bool:
    """Encodes every pair of the source into the store in task.folder. False when the store already holds them all.

    Goes on where a killed process stopped. A source that is new to the store is appended, without the pairs that the
    store already holds. Pairs that it holds without their images are encoded if those are readable now. Raises
    UserError when the store was made with other settings, or too many images are unreadable.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    sweep_away(task.folder)
    index = read_index(task.folder) or {"settings": dict(task.settings), "sources": [], "shards": [], "finished": False}
    _check(task, index)
    sources, shards = index["sources"], index["shards"]
    own, fingerprints = task.fingerprint, [source["fingerprint"] for source in sources]
    new = own not in fingerprints
    if not new and not same_files(sources[fingerprints.index(own)], task.source, task.first, task.end, shards):
        raise other_files(task)
    if index["finished"] and not new and (not any(shard["bad"] for shard in shards) or _inside(task)):
        return False
    if sources and not index["finished"] and fingerprints[-1] != own:
        raise UserError(f"{task.folder} is not finished: go on with {sources[-1]['name']} before adding {task.name}")
    if new:
        sources.append(_about(task, shards))
    number = len(sources) - 1 if new else fingerprints.index(own)
    index["finished"] = index["finished"] and not new
    held, before = known(task.folder, index), len(shards)
    if new:
        check_appended(task, index, held[0])
    if not index["finished"]:
        write_index(task.folder, index)
    begun = any(shard["source"] == number and "instead" not in shard for shard in shards)
    for shard in [] if begun and _inside(task) else _mended(task, index, number, held[0], held[1], held[3]):
        shards.append(shard)
        write_index(task.folder, index)
    if len(shards) > before:
        held = known(task.folder, index)
        pairs = sum(shard["pairs"] for shard in shards[before:])
        log.info("%s: pairs that were left out and have readable images now: %d", task.folder, pairs)
    if index["finished"]:
        return len(shards) > before
    for shard in _shards(task, index, *held):
        shards.append(shard)
        write_index(task.folder, index)
    index["finished"] = True
    write_index(task.folder, index)
    return True


def _inside(task: Filling) -> bool:
    """Whether the images lie inside of the set's own files: with others it would be another set."""
    if task.source.groups is None:
        return False
    pairs = [task.source[i] for i in range(task.first, min(task.first + 1, task.end))]
    return all(image.path is None for pair in pairs for image in pair.images)


def _about(task: Filling, shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": task.name,
        "fingerprint": task.fingerprint,
        "window": task.source.window,
        "groups": task.source.groups is not None,
        "summary": dict(task.source.summary),
        **({"labelled_by": judges} if (judges := labelled.judges(Path(task.name))) else {}),
    } | stamp(task.source, task.first, task.end, shards)


def _check(task: Filling, index: Mapping[str, Any]) -> None:
    if "parts" in index:
        raise UserError(f"{task.folder} was merged from parts: add data to a part of its own, then merge again")
    for name, value in (UNNAMED | dict(task.settings)).items():
        found = (UNNAMED | index["settings"]).get(name)
        if name == "buckets" and bool(found) != bool(value):
            have, change = ("squares", "leave --buckets out") if value else ("shapes", "give --buckets")
            raise UserError(f"{task.folder} holds {have}: {change}, or name another --store")
        if name == "sides" and found != value:
            kinds = {1: "images without partners", 2: "pairs"}
            raise UserError(f"{task.folder} holds {kinds[found]}, and {task.name} {kinds[value]}: name another --store")
        if found != value and not (found is None and name in NOT_ALWAYS):
            raise UserError(
                f"{task.folder} was prepared with {name} {found}, now it is {value}: use the same, or another --store"
            )


def _mended(
    task: Filling, index: dict[str, Any], number: int, images: Known, captions: Known, next_image: int
) -> Iterator[dict[str, Any]]:
    """Tries the images of the pairs that are holes again, and yields an entry for each shard of those readable now.

    number: the place of the task's source in the index. Images that are still unreadable stay what they were.
    """
    left = holes(task.folder, index["shards"])
    upto = [shard["upto"] for shard in index["shards"] if shard["source"] == number]
    again = frozenset(images.keys[images.rows == NOWHERE].tolist())
    images, taken = images.usable(), []  # the rows of a shard's holes

    def wanted() -> Iterator[tuple[int, Pair]]:
        for i in range(task.first, task.end) if left else ():
            if rows := left.get((pair := task.source[i]).key):
                taken.append(rows.pop(0))
                yield i, pair

    pairs = wanted()
    with ThreadPoolExecutor(max(1, task.workers)) as pool:
        while True:
            taken.clear()
            shard = Shard(again=again)
            next_image = _collect(task, pool, islice(pairs, task.pairs_per_shard), shard, images, captions, next_image)
            if not taken:
                return
            whole = [win >= 0 and lose >= 0 for _, win, lose, *_ in shard.pairs]
            shard.pairs = [pair for pair, good in zip(shard.pairs, whole, strict=True) if good]
            shard.bad.clear()
            if shard.image_keys or shard.pairs:
                entry = _write(task, index, number, upto[-1] if upto else task.first, shard)
                entry["instead"] = [row for row, good in zip(taken, whole, strict=True) if good]
                yield entry | {"mended": {str(key): shard.files[key] for key in shard.mended}}
            images.settle()


def _write(task: Filling, index: Mapping[str, Any], number: int, upto: int, shard: Shard) -> dict[str, Any]:
    """Writes the next shard, of the pairs before `upto` of source `number`; its entry for the index."""
    name = f"{len(index['shards']):06d}.safetensors"
    entry = write_shard(task.folder / name, tensors := shard.tensors(task.encode, task.buckets))
    entry |= {"source": number, "upto": upto, "pairs": len(shard.pairs), "bad": len(shard.bad)}
    entry |= {"images": len(shard.image_keys), "captions": len(shard.captions), "crc": tables_crc(tensors)}
    files = {str(key): shard.files[key] for key in shard.bad}
    return entry | ({"bad_files": files} if files else {})


def _shards(
    task: Filling, index: dict[str, Any], images: Known, captions: Known, stored: np.ndarray, next_image: int
) -> Iterator[dict[str, Any]]:
    """Makes the missing shards, one after another, and yields their entries for the index."""
    source_number = len(index["sources"]) - 1
    bad = sum(map(len, holes(task.folder, index["shards"]).values()))
    read, last_bad = len(in_order([index["shards"]])), "see the log of an earlier call"
    mine = [shard for shard in index["shards"] if shard["source"] == source_number]
    first, last = mine[-1]["upto"] if mine else task.first, task.end
    begin = first
    check_bad(bad, read + last - begin, task.bad_image_limit, last_bad)  # a shard that was too many is in the index
    skip = AlreadyStored(stored if source_number else np.empty(0, dtype=np.int64))
    if source_number:
        skip.pass_over(int(task.source[i].key) for i in range(task.first, first))
    stream = read_ahead(((i, task.source[i]) for i in range(first, last)), READ_AHEAD)
    try:
        with ThreadPoolExecutor(max(1, task.workers)) as pool:
            while first < last or not index["shards"]:
                stop = min(first + task.pairs_per_shard, last)
                shard = Shard()
                if not index["shards"]:
                    captions.recent[caption_key("")] = 0
                    shard.captions.append("")
                wanted = ((i, pair) for _, (i, pair) in zip(range(first, stop), stream) if not skip.has(pair.key))
                next_image = _collect(task, pool, wanted, shard, images, captions, next_image)
                entry = _write(task, index, source_number, stop, shard)
                bad += sum(NOWHERE in (win, lose) for _, win, lose, *_ in shard.pairs)
                last_bad = next(reversed(shard.bad.values()), last_bad)
                images.settle()
                captions.settle()
                first = stop
                yield entry
                task.progress(first - task.first, last - task.first)
                check_bad(bad, read + last - begin, task.bad_image_limit, last_bad)
    finally:
        stream.close()


def _collect(
    task: Filling,
    pool: ThreadPoolExecutor,
    pairs: Iterator[tuple[int, Pair]],
    shard: Shard,
    images: Known,
    captions: Known,
    next_image: int,
) -> int:
    """Gives every pair of a shard its rows and encodes new images; the number of images in the store afterwards."""
    waiting: deque[tuple[int, ImageRef, str, Future[Decoded]]] = deque()
    rows: list[PairRow] = []
    begin, text_rows = next_image, len(captions.keys)

    def finish(count: int) -> None:
        nonlocal next_image
        while len(waiting) > count:
            key, image, caption, future = waiting.popleft()
            try:
                pixels, micro = future.result()
            except BadImage as error:
                plain = image_key(image)  # in another shape it is unreadable too
                images.recent |= {name: NOWHERE for name in (key, plain) if images.get(name) is None}
                shard.bad[plain] = unreadable(image, caption, error)
                shard.files[plain] = state(image)
                if task.stop_at_bad:
                    raise UserError(STOPPED.format(shard.bad[plain])) from error
                log.warning("left out: %s", shard.bad[plain])
                continue
            images.recent[key] = next_image
            next_image += 1
            if shard.again and (plain := image_key(image)) in shard.again:
                shard.files[plain] = state(image)
                shard.mended.append(plain)
            shard.add(key, torch.stack(pixels), micro, task.encode)

    pending: set[int] = set()
    for i, pair in pairs:
        bucket = of_pair(task.sizes, pair, task.max_mib, task.cut) if task.buckets else 0
        size = task.sizes[bucket]
        found = [image_key(image, None if size[0] == size[1] else size) for image in pair.images]
        win, lose = found[0], found[-1]
        if embedded_twice(pair):
            log.warning("pair left out, of %s: %s", excerpt(pair.caption), SAME)
            win = lose = caption_key(SAME)
            images.recent |= {} if images.get(win) else {win: TWICE}  # a hole, as it is from the images
        for key, image in zip((win, lose), pair.images):
            if key not in pending and images.get(key) is None:
                if images.get(image_key(image)) == NOWHERE:
                    images.recent[key] = NOWHERE
                    continue
                pending.add(key)
                waiting.append((key, image, pair.caption, pool.submit(_decode, image, size, task)))
        text = caption_key(pair.caption)
        if captions.get(text) is None:
            captions.recent[text] = text_rows + len(shard.captions)
            shard.captions.append(pair.caption)
        group = int(task.source.groups[i]) if task.source.groups is not None else 0
        rows.append((pair.key, win, lose, captions.row(text), float(task.source.prob[i]), group, bucket))
        finish(2 * (task.encode.image_batch + task.workers))
    finish(0)
    shard.finish(task.encode)
    assert next_image - begin == len(shard.image_keys)
    shard.pairs += [(row[0], images.row(row[1]), images.row(row[2]), *row[3:]) for row in rows]
    return next_image


Decoded = tuple[list[Tensor], Micro]


def _decode(image: ImageRef, size: Size, task: Filling) -> Decoded:
    """An image's pixels (and those of its mirror image, where the store has them) and its `Micro`. Raises BadImage."""
    data = image.load(task.max_mib)
    found = [fitted(data, size, flip=flip) for flip in (False, True)[: 1 + task.settings["flip"]]]
    return [pixels for pixels, _ in found], found[0][1]

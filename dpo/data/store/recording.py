"""Recording reference errors, block by block, so that a kill costs little; several processes may share the work."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import digest, number_of
from dpo.data.batch import Decoding, PairBatch
from dpo.data.buckets import Buckets
from dpo.data.images import Size
from dpo.data.order import Order, run_order
from dpo.data.store.files import (
    DamagedStore,
    check_shard,
    open_shard,
    read_sealed,
    sweep_away,
    write_sealed,
    write_shard,
)
from dpo.data.store.reader import read
from dpo.data.store.recorded import FOLDER, Piece, about_record, again, bands, same_weights
from dpo.data.store.store import Contents, StoreSource

log = logging.getLogger("dpo")

BLOCK_PAIRS = 2048  # pairs whose errors are written at once


@dataclass(frozen=True)
class Recording:
    """What to record: `errors(batch) -> [2, B]` of win and lose for every pair, in each of `draws` draws."""

    contents: Contents
    identity: Mapping[str, Any]  # see recorded.identity
    checksum: str  # of all the reference's weights
    timesteps: tuple[int, ...]
    made_with: Mapping[str, Any]  # for people to read
    draws: int
    batch_size: int  # pairs
    errors: Callable[[PairBatch], Tensor]
    decoding: Decoding  # its seed decides the order of the pairs too
    shard: tuple[int, int] = (0, 1)  # this process and the number of processes
    block: int = BLOCK_PAIRS
    sizes: tuple[Size, ...] = ()  # the shapes of a store with buckets
    progress: Callable[[int, int], None] = lambda done, total: None


def record(task: Recording) -> tuple[Path, bool]:
    """Records what is missing. Returns the record's folder, and whether it is complete.

    It is not while other processes are still at work. Raises UserError when an error is not finite.
    """
    named = json.dumps([dict(task.identity), list(task.timesteps)], sort_keys=True)
    folder = task.contents.folder / FOLDER / digest(named)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    about = about_record(folder) or {
        "identity": dict(task.identity),
        "reference_checksum": task.checksum,
        "timesteps": list(task.timesteps),
        "pieces": [],
    }
    if not same_weights(about, task.checksum):
        raise UserError(f"{folder} was recorded with another reference, which differs in few weights; {again(folder)}")
    for entry in about["pieces"]:
        check_shard(folder / entry["file"], entry, remedy=again(folder))
        shutil.rmtree(folder / Piece(*entry["piece"]).name, ignore_errors=True)  # its blocks, where a kill left them
    if task.shard[1] == 1:  # with several, another process may be writing there
        sweep_away(folder)
    complete = True
    for piece in _missing(about, task):
        entry = _piece(task, folder, piece)
        if entry is None:
            complete = False
            continue
        about["pieces"].append(entry | {"made_with": dict(task.made_with) | {"batch_size": task.batch_size}})
        write_sealed(folder / "record.json", about)
        shutil.rmtree(folder / piece.name, ignore_errors=True)
    return folder, complete


def _missing(about: Mapping[str, Any], task: Recording) -> list[Piece]:
    have = bands([Piece(*entry["piece"]) for entry in about["pieces"]])
    pieces = [Piece(begin, end, draws, task.draws) for (begin, end), draws in have.items() if draws < task.draws]
    first, last = max((end for _, end in have), default=0), len(task.contents.key)
    return [*pieces, *([Piece(first, last, 0, task.draws)] if first < last else [])]


def _piece(task: Recording, folder: Path, piece: Piece) -> dict[str, Any] | None:
    """The entry of a piece, recorded block by block; None while blocks of other processes are missing.

    The batches are those of a training run over these pairs from its start, so that a run of the same batch size has
    exactly these; the last one may reach into the next epoch. With buckets they have its shapes and length, and the pairs
    of a block are sorted by shape.
    """
    contents, size = task.contents, task.batch_size
    pairs = StoreSource(contents, np.arange(piece.begin, piece.end), 0.0)
    begin, end = piece.first * len(pairs) // size * size, piece.last * len(pairs)
    step = -(-task.block // size) * size
    work = folder / piece.name
    paths = [work / f"batch-{size:05d}-{start:012d}.safetensors" for start in range(begin, end, step)]
    for number, path in enumerate(paths):
        if number % task.shard[1] == task.shard[0] and _kept(path, "is recorded again") is None:
            start = begin + number * step
            stop = min(start + step, -(-end // size) * size)
            _keep(path, _block(task, pairs, range(start, stop), path, _said(task, number * step, end - begin)))
    errors = torch.full((piece.last - piece.first, len(pairs), 2), torch.nan)
    for path in paths:
        block = _kept(path, "belongs to another process, which should be started again")
        if block is None:
            return None
        wanted = (block["draw"] >= piece.first) & (block["draw"] < piece.last)
        errors[block["draw"][wanted] - piece.first, block["pair"][wanted]] = block["errors"].T[wanted]
    if not errors.isfinite().all():
        raise UserError(
            f"the reference's error is not finite in {number_of(int((~errors.isfinite()).any(2).sum()), 'draws')}: try another "
            "--precision"
        )
    entry = write_shard(folder / f"{piece.name}.safetensors", {"errors": errors})
    number = int(np.searchsorted(contents.pairs.starts, piece.end))
    place = [piece.begin, piece.end, piece.first, piece.last]
    return entry | {"piece": place, "shards": number, "store": digest(*contents.sums[:number])}


def _said(task: Recording, before: int, total: int) -> Callable[[int], None]:
    return lambda done: task.progress(min(before + done, total), total)


def _block(
    task: Recording, pairs: StoreSource, positions: range, path: Path, said: Callable[[int], None]
) -> dict[str, Tensor]:
    """The N `positions` of a run over `pairs`: "errors" [2, N], and the "pair" and "draw" [N] of each.

    What is finished when Ctrl-C comes is written beside `path`, the block's file, and gone on from at the next call.
    """
    begun = path.with_suffix(".begun.safetensors")
    found = list(filter(None, [_kept(begun, "is recorded again")]))
    done = sum(len(part["pair"]) for part in found)
    order = Order(
        task.decoding.seed,
        positions.start,
        task.batch_size,
        positions.stop,
        update=len(positions),
        buckets=Buckets(task.sizes, task.contents.bucket[pairs.pairs]) if task.contents.bucket is not None else None,
    )
    places = list(run_order(pairs, order))
    before = itertools.accumulate((place.pairs for place in places), initial=0)
    places = [place for place, count in zip(places, before, strict=False) if count >= done]
    stream = read(pairs, places, task.decoding)
    try:
        for place, batch in zip(places, stream, strict=True):
            errors, n = task.errors(batch).float().cpu(), place.pairs
            found.append(
                {
                    "pair": torch.tensor(place.indices[:n]),
                    "draw": torch.tensor(place.epochs[:n]),
                    "errors": errors[:, :n],
                }
            )
            done += n
            said(done)
    except KeyboardInterrupt:
        if found:
            _keep(begun, _joined(found))
        raise
    return _joined(found)


def _keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a block, and beside it what `_kept` checks it by."""
    path.with_suffix(".json").unlink(missing_ok=True)  # that of a block that is replaced
    write_sealed(path.with_suffix(".json"), write_shard(path, tensors))


def _kept(path: Path, then: str) -> dict[str, Tensor] | None:
    """A block that `_keep` wrote; None where a kill left it unfinished, or it was altered since.

    then: what the warning says of an altered one.
    """
    about = path.with_suffix(".json")
    if not path.exists() or not about.exists():  # the checksum comes last
        return None
    try:
        entry = read_sealed(about, then)
        assert entry is not None, "it exists"
        check_shard(path, entry, whole=True, remedy=then)
        return open_shard(path, then)
    except DamagedStore as error:
        log.warning("%s", error)
        return None


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}

"""Micro-batches of any source, images or a prepared store, in the order of the run."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from dpo.data import loader
from dpo.data.batch import PairBatch
from dpo.data.order import run_order
from dpo.data.pairs import Source
from dpo.data.store.reader import Recorded, _ahead, _Reader, plain_batches
from dpo.data.store.store import of_store


def batches(source: Source, cfg: Any, *, recorded: Recorded | None = None, **how: Any) -> Generator[PairBatch, None, None]:
    """`loader.batches` for every kind of source; from a store with latents, encoded text and recorded errors."""
    store = of_store(source)
    if store is None:
        assert recorded is None, "recorded reference errors belong to a prepared store"
        yield from loader.batches(source, cfg, **how)
        return
    read = _Reader(store, how["seed"], cfg.flip, cfg.caption_dropout, recorded)
    places = run_order(
        store, how["seed"], how["start"], how.get("stop"), how["micro_batch"], how.get("rank", 0), how.get("world", 1)
    )
    yield from _ahead(read.batch(*place) for place in places)


def held_out_batches(source: Source, cfg: Any, *, micro_batch: int, **how: Any) -> Generator[PairBatch, None, None]:
    """`loader.held_out_batches` for every kind of source."""
    store = of_store(source)
    if store is None:
        yield from loader.held_out_batches(source, cfg, micro_batch=micro_batch, **how)
        return
    yield from _ahead(plain_batches(store, micro_batch))

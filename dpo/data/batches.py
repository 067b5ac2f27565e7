"""Micro-batches of any source, images or a prepared store, in the order of the run."""

from __future__ import annotations

from collections.abc import Generator

from dpo.data import loader
from dpo.data.batch import Decoding, PairBatch
from dpo.data.buckets import Buckets
from dpo.data.kept import Kept
from dpo.data.loader import Reading
from dpo.data.order import Order, run_order, stored_order
from dpo.data.pairs import Source
from dpo.data.store import reader
from dpo.data.store.recorded import RecordedErrors
from dpo.data.store.store import of_store


def batches(
    source: Source,
    order: Order,
    decoding: Decoding,
    reading: Reading,
    recorded: RecordedErrors | None = None,
    kept: Kept | None = None,
) -> Generator[PairBatch, None, None]:
    """The micro-batches of `order`; close the generator to end the workers or the thread that read ahead.

    Images are decoded by worker processes, but not those of pairs that are `kept`. A prepared store gives latents,
    encoded text and, with `recorded`, the reference's errors. Raises UserError for unreadable images, as `reading`
    says, and when a worker dies.
    """
    store = of_store(source)
    if store is not None:
        return reader.read(store, run_order(store, order), decoding, recorded)
    assert recorded is None, "recorded reference errors belong to a prepared store"
    return loader.load(source, run_order(source, order), decoding, reading, order.micro_batch, kept)


def held_out_batches(
    source: Source,
    micro_batch: int,
    resolution: int,
    reading: Reading,
    rank: int = 0,
    world: int = 1,
    buckets: Buckets | None = None,
) -> Generator[PairBatch, None, None]:
    """One pass over held-out pairs in stored order: draw 0, centre crop, not mirrored, captions kept.

    The last micro-batch (with `buckets`, of each shape) may be short. rank, world, buckets: as in `stored_order`. Raises
    UserError as `batches` does.
    """
    plain, store = Decoding(resolution, seed=0), of_store(source)
    places = stored_order(source, micro_batch, rank, world, buckets)
    if store is not None:
        return reader.read(store, places, plain)
    return loader.load(source, places, plain, reading, micro_batch)

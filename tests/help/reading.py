"""Batches of a source as a run with these settings reads them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from dpo.data.batch import Decoding, PairBatch
from dpo.data.batches import batches, held_out_batches
from dpo.data.loader import Reading
from dpo.data.order import Order
from dpo.data.pairs import Source
from dpo.data.store.recorded import RecordedErrors
from dpo.settings.config import Data


def stream(
    source: Source,
    data: Data,
    order: Order,
    resolution: int = 32,
    workers: int = 0,
    recorded: RecordedErrors | None = None,
) -> Generator[PairBatch, None, None]:
    """`batches`, with everything else as the settings say."""
    decoding = Decoding.of(replace(data, resolution=resolution), order.seed)
    return batches(source, order, decoding, Reading.of(replace(data, workers=workers)), recorded)


def held_out_stream(
    source: Source, data: Data, micro_batch: int, resolution: int = 32, workers: int = 0
) -> Generator[PairBatch, None, None]:
    """`held_out_batches`, with everything else as the settings say."""
    return held_out_batches(source, micro_batch, resolution, Reading.of(replace(data, workers=workers)))

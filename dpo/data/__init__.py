"""Preference pairs: sources, order, images and the loader. Knows nothing of models or of the trainer."""

from dpo.data.batch import PairBatch
from dpo.data.loader import of_dead_worker, worker_died
from dpo.data.pairs import BadImage, Held, ImageRef, Pair, Source
from dpo.data.prepared import batches, held_out_batches
from dpo.data.sources import describe, open_source, open_sources
from dpo.data.store import of_store

__all__ = [
    "BadImage",
    "Held",
    "ImageRef",
    "Pair",
    "PairBatch",
    "Source",
    "batches",
    "describe",
    "held_out_batches",
    "of_dead_worker",
    "of_store",
    "open_source",
    "open_sources",
    "worker_died",
]

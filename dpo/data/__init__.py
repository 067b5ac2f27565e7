"""Preference pairs: sources, order, images and the loader. Knows nothing of models or of the trainer."""

from dpo.data.batch import PairBatch
from dpo.data.loader import batches, held_out_batches
from dpo.data.pairs import BadImage, Held, ImageRef, Pair, Source
from dpo.data.sources import describe, open_source, open_sources

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
    "open_source",
    "open_sources",
]

"""What a prepared store is filled with, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo.data.buckets import Cut, shapes
from dpo.data.images import Size
from dpo.data.pairs import MAX_MIB, Source
from dpo.data.store.shard import Encode


@dataclass(frozen=True)
class Filling:
    """What to fill a store with, and how."""

    folder: Path
    name: str  # of the data, as the user gave it
    source: Source
    settings: Mapping[str, Any]  # what every shard of a store must share; "resolution" and "flip" are used here
    encode: Encode
    pairs_per_shard: int
    workers: int = 0
    bad_image_limit: float = 0.01  # share of the pairs
    max_mib: int = MAX_MIB  # of an image file
    stop_at_bad: bool = False  # whether the first unreadable image ends it
    first: int = 0  # this process encodes the pairs first..last-1 of the source
    last: int | None = None  # None: to the source's end
    beside: Sequence[Path] = ()  # the other parts of the store, which other processes fill
    progress: Callable[[int, int], None] = lambda done, total: None
    cut: Cut = field(default_factory=Cut)  # counts the images of pairs with buckets

    @property
    def end(self) -> int:
        return len(self.source) if self.last is None else self.last

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}:{self.first}:{self.end}"

    @property
    def buckets(self) -> bool:
        return bool(self.settings.get("buckets"))

    @functools.cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The shapes that images are cut to."""
        side = self.settings["resolution"]
        return shapes(side, self.settings["buckets"]) if self.buckets else ((side, side),)

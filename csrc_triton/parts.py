"""Shards of a parameter as AdamW8bit counts them: blocks, elements and 8-bit or fp32 are those of the whole tensor."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

BLOCK = 256
MIN_8BIT_ELEMENTS = 4096
ARENAS = {  # state tensor -> (of quantised parameters, elements per number)
    "m_8bit": (True, 1), "v_8bit": (True, 1), "m_max": (True, BLOCK), "v_max": (True, BLOCK),
    "m_fp32": (False, 1), "v_fp32": (False, 1),
}  # fmt: skip


class Part(NamedTuple):
    """Where a parameter lies in the whole tensor that it is a shard of: shards follow one another in memory order."""

    counts: tuple[int, ...]  # elements of each shard
    rank: int  # the number of this one
    order: int  # memory order of the whole: 0 contiguous, 1 channels_last

    @property
    def first(self) -> int:
        """The elements of the whole before this shard."""
        return sum(self.counts[: self.rank])

    @property
    def whole(self) -> int:
        return sum(self.counts)

    @property
    def quantised(self) -> bool:
        """Whether the moments are in 8 bits: the whole tensor decides."""
        return self.whole >= MIN_8BIT_ELEMENTS

    @property
    def units(self) -> list[int]:
        """Elements of each shard in its arena, without the gap behind them: whole blocks where it is quantised."""
        return [-(-count // BLOCK) * BLOCK for count in self.counts] if self.quantised else list(self.counts)

    def cuts_a_block(self) -> bool:
        """Whether a shard ends inside a quantisation block that goes on in the next one."""
        ends = itertools.accumulate(self.counts)
        return self.quantised and any(end % BLOCK and end < self.whole for end in ends)


def arena(parts: Iterable[Part], units: Iterable[int]) -> tuple[list[int], list[int]]:
    """The start of each parameter in its arena, and the sizes of both arenas: fp32 moments, 8-bit moments."""
    starts, sizes = [], [0, 0]
    for part, count in zip(parts, units, strict=True):
        starts.append(sizes[part.quantised])
        sizes[part.quantised] += -(-count // 4) * 4
    return starts, sizes

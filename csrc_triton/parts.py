"""Shards of a parameter as AdamW8bit counts them: blocks, elements and 8-bit or fp32 are those of the whole tensor."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch

BLOCK = 256
MIN_8BIT_ELEMENTS = 4096
ARENAS = {  # state tensor -> (of quantised parameters, elements per number)
    "m_8bit": (True, 1), "v_8bit": (True, 1), "m_max": (True, BLOCK), "v_max": (True, BLOCK),
    "m_fp32": (False, 1), "v_fp32": (False, 1),
}  # fmt: skip

# gather(part [n], counts): the parts of all shards, of `counts` numbers, one after another; None where another has them
Gather: TypeAlias = Callable[[torch.Tensor, list[int]], torch.Tensor | None]


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


def _whole_arena(parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    return arena(parts, [sum(part.units) for part in parts])


@torch.no_grad()
def gathered(
    live: Mapping[str, torch.Tensor], parts: Sequence[Part], starts: Sequence[int], gather: Gather
) -> dict[str, torch.Tensor] | None:
    """The arenas of the whole tensors on the CPU, as an optimizer without shards has them; None where `gather` gives None.

    live: the arenas of a shard, in which each parameter begins at its place in `starts`.
    """
    places, sizes = _whole_arena(parts)
    state: dict[str, torch.Tensor] = {}
    kept = True
    for name, (quantised, each) in ARENAS.items():
        fill = 127 if name == "m_8bit" else 0  # the code of zero
        state[name] = live[name].new_full((sizes[quantised] // each,), fill, device="cpu")
        for part, start, place in zip(parts, starts, places, strict=True):
            if part.quantised != quantised:
                continue
            counts = [count // each for count in part.units]
            found = gather(live[name][start // each :][: counts[part.rank]], counts)
            if found is None:
                kept = False
            else:
                state[name][place // each :][: sum(counts)] = found
    return state if kept else None


@torch.no_grad()
def put(
    live: Mapping[str, torch.Tensor], parts: Sequence[Part], starts: Sequence[int], whole: Mapping[str, torch.Tensor]
) -> None:
    """Copies the arenas of the whole tensors into those of a shard, as `gathered` takes them."""
    places, _ = _whole_arena(parts)
    for name, (quantised, each) in ARENAS.items():
        for part, start, place in zip(parts, starts, places, strict=True):
            if part.quantised == quantised:
                count, before = part.units[part.rank] // each, sum(part.units[: part.rank])
                live[name][start // each :][:count].copy_(whole[name][(place + before) // each :][:count])


def chunks_of(rows: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """[programs, 2] int32: the row of the table and the number of the chunk, of `counts[i]` chunks for `rows[i]` each."""
    each = torch.tensor(counts)
    first = torch.repeat_interleave(each.cumsum(0) - each, each)
    chunk = torch.arange(len(first)) - first
    return torch.stack([torch.repeat_interleave(torch.tensor(rows), each), chunk], dim=1).to(torch.int32)

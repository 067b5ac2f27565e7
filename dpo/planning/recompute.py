"""Which blocks the backward pass computes again where --checkpointing leaves it open: as few as fit the memory at hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpo.common.errors import UserError
from dpo.planning import fitting, sketch, work
from dpo.planning.asked import Asked
from dpo.planning.cuda import GIB
from dpo.planning.work import Dry
from dpo.settings.config import Config, change
from dpo.training.embedded import embedded

log = logging.getLogger("dpo")


class Choice(NamedTuple):
    """A value of --checkpointing, and the planned peak with it in bytes; None where it was not planned."""

    setting: str
    peak: int | None


def levels(denoiser: Mapping[str, Any]) -> tuple[str, ...]:
    """Values of --checkpointing for a denoiser of this config, from no recomputed block to all.

    Between them stand, of a UNet, the outermost blocks with attention: they keep the most of all for the work of computing
    them again. The blocks of a transformer are alike, and all of them or none are computed again.
    """
    if "down_block_types" not in denoiser:
        return "off", "on"
    down, up = denoiser["down_block_types"], denoiser["up_block_types"]
    first = next((i for i, kind in enumerate(down) if "CrossAttn" in kind), None)
    last = next((i for i in reversed(range(len(up))) if "CrossAttn" in up[i]), None)
    middle = () if first is None or last is None else (f"down_blocks.{first},up_blocks.{last}",)
    return "off", *middle, "on"


def lightest(config: Config, settings: Sequence[str], room: float, dry: Dry) -> Choice:
    """The first of `settings` whose planned peak is at most `room` bytes; the last where none before it fits.

    Raises UserError where no plan can be made.
    """
    for setting in settings[:-1]:
        peak = work.plan(change(config, checkpointing=setting), Asked(), dry).peak
        if peak <= room:
            return Choice(setting, peak)
    return Choice(settings[-1], None)


def at_start(config: Config, dry: Dry, free: int | None) -> tuple[Choice, str]:
    """The choice for a run that begins with `free` bytes of GPU memory (None: on a CPU), and a line for the log.

    A model whose shape cannot be read before it is loaded gets all blocks recomputed, which is said.
    """
    if free is None:
        return Choice("off", None), "checkpointing: off, on a CPU"
    try:
        planned, _ = work.prepared(embedded(config))
        shape = sketch.sketch(planned.model).denoiser.config
        choice = lightest(planned, levels(shape), free, dry)
    except UserError as error:
        return Choice("on", None), f"checkpointing: on, since no plan can be made ({error})"
    if choice.peak is None:
        return choice, f"checkpointing: {choice.setting}, since less does not fit {free / GIB:.1f} GiB by the plan"
    return choice, f"checkpointing: {choice.setting} (planned {choice.peak / GIB:.1f} of {free / GIB:.1f} GiB)"


def free_memory(device: str) -> int | None:
    """Bytes that are free on the GPU of --device; None where the run is on a CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(None if device in ("auto", "cuda") else device)[0]


def what_fits(config: Config, dry: Dry, card: float) -> str:
    """The cheapest changes with which a run fits a card of so many GB, in words for a message; "" where none is known."""
    try:
        planned, _ = work.prepared(embedded(config))
        found = fitting.cheapest(work.plan(planned, Asked(), dry).config, Asked(), dry, card, lambda line: None)
    except UserError:
        return ""
    if found is None or not found.changes:
        return ""
    flags = "; ".join(one.flags for one in found.changes)
    return f"by the plan this would fit: {flags} ({found.plan.peak / GIB:.1f} GiB)"

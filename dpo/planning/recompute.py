"""Which blocks the backward pass computes again where --checkpointing leaves it open: as few as fit the memory at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dpo.common.errors import UserError
from dpo.models.ready import pick_device
from dpo.planning import sketch, work
from dpo.planning.asked import Asked
from dpo.planning.cuda import GIB
from dpo.planning.dry import TrainStep
from dpo.planning.work import Dry
from dpo.settings.config import Config, change
from dpo.training.folder import folder_of
from dpo.training.parallel import Processes
from dpo.training.state import checkpointing_before


class Choice(NamedTuple):
    """A value of --checkpointing, and the planned peak with it in bytes; None where it was not planned."""

    setting: str
    peak: int | None


class Memory(NamedTuple):
    """Of a GPU, in bytes: what this process has or can still get, and all that CUDA has."""

    room: int
    total: int


def levels(unet: Mapping[str, Any]) -> tuple[str, ...]:
    """Values of --checkpointing for a denoiser of this config, from no recomputed block to all.

    Between them stand the outermost blocks with attention of a UNet: they keep the most of all for the work of computing
    them again. A transformer's blocks are alike, and have no names here.
    """
    if "down_block_types" not in unet:
        return "off", "on"
    down, up = unet["down_block_types"], unet["up_block_types"]
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


def chosen(config: Config, dry: Dry, room: float) -> tuple[Choice, str]:
    """What --checkpointing auto means for `room` bytes of GPU memory, and a line that says so with its numbers.

    config: with the embedded world, or its store, taken in (`work.prepared`). Raises UserError where no plan can be made.
    """
    if config.runtime.cuda_graph:
        return Choice("on", None), "on, since a plan does not count the memory that --cuda-graph keeps"
    choice = lightest(config, levels(sketch.sketch(config.model).denoiser.config), room, dry)
    if choice.peak is None:
        return choice, f"{choice.setting}, since less does not fit {room / GIB:.1f} GiB by the plan"
    return choice, f"{choice.setting} (planned {choice.peak / GIB:.1f} of {room / GIB:.1f} GiB)"


def at_start(config: Config, dry: Dry, room: int | None) -> tuple[Choice, str]:
    """The choice for a run that begins with `room` bytes of GPU memory (None: on a CPU), and a line for the log.

    A model whose shape cannot be read before it is loaded gets all blocks recomputed, which is said.
    """
    if room is None:
        return Choice("off", None), "checkpointing: off, on a CPU"
    try:
        choice, said = chosen(work.prepared(config), dry, room)
    except UserError as error:
        return Choice("on", None), f"checkpointing: on, since no plan can be made ({error})"
    return choice, f"checkpointing: {said}"


def decided(config: Config, train_step: TrainStep, processes: Processes) -> tuple[Config, str]:
    """`config` with --checkpointing decided, the same in all processes, and a line for the log.

    A run that is resumed keeps what it had; a new one gets what fits the memory that is free on its GPU, of several
    processes on the smallest. They are joined for that. Raises UserError.
    """
    device = pick_device(processes.device(config.runtime.device))
    processes.join(device)
    kept = checkpointing_before(config.output, folder_of(config)) if processes.first else None
    if before := processes.objects(kept)[0]:
        line = f"checkpointing: {before}, as the run had it (--checkpointing off, on or blocks: otherwise)"
        return change(config, checkpointing=before), line
    known = [each.room for each in processes.objects(memory_of(device)) if each is not None]
    room = min(known) if known else None
    with work.quietly():  # the first one plans for all
        found = at_start(config, work.planner(train_step, processes.count), room) if processes.first else None
    choice, line = next(each for each in processes.objects(found) if each is not None)
    return change(config, checkpointing=choice.setting), line


def memory_of(device: torch.device) -> Memory | None:
    """The memory of a GPU; None for a CPU."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Memory(free + torch.cuda.memory_reserved(device), total)

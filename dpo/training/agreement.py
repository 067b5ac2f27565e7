"""Whether the processes of a run agree: on what it is made from, and now and then on all that is trained.

Were each to train a model of its own, or were one a bit off, no figure would show it: the losses look alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import excerpt
from dpo.settings.config import Config, flatten, specs
from dpo.training import checkpoint
from dpo.training.optimizer import Updater
from dpo.training.parallel import Processes

EVERY = 100  # updates between two looks at what is trained
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
OWN = {"device", "model", "data", "validation_data"}  # settings that name places of a process; contents are compared


class Disagreed(UserError):
    """The processes train different models; which of them is right nobody can say."""


def check_made(processes: Processes, config: Config, made: Mapping[str, Any]) -> None:
    """Raises UserError where the processes differ in a setting that counts, or in `made`: what the run is made from."""
    if processes.count == 1:
        return
    asked = {
        name: value
        for name, value in flatten(config).items()
        if name not in OWN and specs()[name].meta["resume"] != "free"
    }
    own = {f"setting {name}": str(value) for name, value in asked.items()}
    own |= {name: str(value) for name, value in made.items() if name != "image_times"}  # copies have other times
    for rank, theirs in enumerate(every := processes.objects(own)):
        for name, value in every[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"process {rank} has another {name} than process 0 ({excerpt(str(theirs.get(name)))}, not {excerpt(value)}): "
                    "start all with the same command, on the same files and versions"
                )


def check_state(processes: Processes, updater: Updater) -> None:
    """Raises Disagreed where gradients, weights or optimizer states differ between processes, by checksums of each tensor."""
    names, sums = [], []
    for name, value in _tensors(updater):
        names.append(name)
        sums.append(checksum(value))
    if not sums:
        return
    every = processes.tensors(torch.stack(sums)).cpu()
    for rank, theirs in enumerate(every):
        if differing := (theirs != every[0]).nonzero().flatten().tolist():
            raise Disagreed(
                f"process {rank} has other {names[differing[0]]} than process 0: each trains a model of its own, so the run "
                "ends; go on from a checkpoint before (--resume latest), and report it where it comes again"
            )


def _tensors(updater: Updater) -> list[tuple[str, Tensor]]:
    """Everything that must be the same in all processes, each with its name in words."""
    device = updater.parameters[0].device
    if updater.shards is not None:  # there is one of each row; gradients are summed later
        return [(f"weights ({rows.name})", rows.own.detach()) for rows in updater.shards.rows if rows.repeated]
    named = list(zip(updater.names, updater.parameters, strict=True))
    found = [(f"weights ({name})", p.detach()) for name, p in named]
    found += [(f"gradients ({name})", p.grad) for name, p in named if p.grad is not None]
    states, _ = checkpoint.pack(updater.optimizer.state_dict())
    found += [(f"optimizer states ({name})", value) for name, value in states.items() if value.device == device]
    return found + [(f"averaged weights ({name})", e) for name, e in zip(updater.names, updater.ema)]


def checksum(value: Tensor) -> Tensor:
    """The sum of a tensor's elements as whole numbers, 0-d int64: exact, in any order, so the same on every device."""
    return value.view(WHOLE[value.element_size()]).sum(dtype=torch.int64)

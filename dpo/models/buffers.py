"""Numbers that a module computes when it is made, and that are in no file: the frequencies of rotary positions (Qwen)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

EXACT = {"positions": "fp32"}
UNROUNDED = ("fp32", "fp64")  # precisions in which nothing was rounded before either


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is in a module's files to `dtype`, in place; what it computed stays, as where a pipeline is loaded in `dtype`.

    In bf16 a frequency of 0.1 is 0.1001, by which the 500th token's angle is off by a twentieth of a radian.
    """
    kept = list(_computed(module))
    module.to(dtype)
    for owner, name, value in kept:
        setattr(owner, name, value)


def positions(precision: str, *encoders: nn.Module) -> dict[str, str]:
    """What tells encodings in half precision from those of earlier versions, which rounded the positions with the weights.

    precision: that the encoders ran in, the first word of it; empty where none of them computes positions.
    """
    rounds = precision.partition(",")[0] not in UNROUNDED
    return dict(EXACT) if rounds and any(True for encoder in encoders for _ in _computed(encoder)) else {}


def _computed(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each module with the name and content of a floating-point buffer of its own that is in no file."""
    for owner in module.modules():
        for name in owner._non_persistent_buffers_set:  # torch has no public way to ask
            value = owner._buffers.get(name)
            if value is not None and value.is_floating_point():
                yield owner, name, value

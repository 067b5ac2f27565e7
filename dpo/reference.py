"""The reference model: a frozen copy of the UNet, or the policy with its adapters off.

Both must see exactly the numerics of the policy: same precision, kernels and batch shape, so that at step 0 every logit
is exactly 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpo.models.denoiser import halve
from dpo.models.lora import adapters_off

Predict = Callable[..., tuple[Tensor, ...]]  # called as a UNet is, without gradient: (prediction [2B, C, H, W],)


def frozen(unet: nn.Module, compute: torch.dtype | None) -> nn.Module:
    """A frozen copy of `unet`; under autocast its Linear and Conv2d weights are kept in the `compute` dtype."""
    twin = copy.deepcopy(unet).requires_grad_(False)
    return halve(twin, compute) if compute is not None else twin


def from_copy(twin: Any) -> Predict:
    """Predict with a frozen module (compiled or not)."""

    def predict(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return twin(*args, **kwargs)

    return predict


def from_adapters(unet: Any, layers: list[nn.Module]) -> Predict:
    """Predict with the policy itself, its adapter `layers` switched off."""

    def predict(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.no_grad(), adapters_off(layers):
            return unet(*args, **kwargs)

    return predict

"""The reference model: a frozen copy of the denoiser, or the policy with its adapters off.

Both must see exactly the numerics of the policy: same precision, kernels and batch shape, so that at step 0 every logit
is exactly 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo.models.denoiser import halve
from dpo.models.family import Denoiser
from dpo.models.lora import adapters_off

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

Predict = Callable[..., tuple[Tensor, ...]]  # called as the denoiser is, without gradient: (prediction [2B, C, H, W],)


def frozen(denoiser: Denoiser, compute: torch.dtype | None) -> Denoiser:
    """A frozen copy of `denoiser`; under autocast its Linear and Conv2d weights are kept in the `compute` dtype."""
    twin = copy.deepcopy(denoiser).requires_grad_(False)
    if compute is not None:
        halve(twin, compute)
    return twin


def from_copy(twin: nn.Module) -> Predict:
    """Predict with a frozen module (compiled or not)."""

    def predict(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return twin(*args, **kwargs)

    return predict


def from_adapters(policy: nn.Module, layers: list[BaseTunerLayer]) -> Predict:
    """Predict with the policy itself, its adapter `layers` switched off."""

    def predict(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.no_grad(), adapters_off(layers):
            return policy(*args, **kwargs)

    return predict

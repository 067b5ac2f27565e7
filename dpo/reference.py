"""The reference model: a frozen copy of the denoiser, or the policy with its adapters off.

Both must have exactly the policy's numerics (precision, kernels, batch shape), so that at step 0 every logit is exactly
0.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo.models.denoiser import halve
from dpo.models.family import Denoise, Denoiser, TextEncoding
from dpo.models.lora import adapters_off

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


def frozen(denoiser: Denoiser, compute: torch.dtype | None) -> Denoiser:
    """A frozen copy of `denoiser`. Under autocast to `compute` its Linear and Conv2d weights are kept in that dtype.

    `compute` None: no autocast, and the copy keeps the dtype of `denoiser`.
    """
    twin = copy.deepcopy(denoiser).requires_grad_(False)
    if compute is not None:
        halve(twin, compute)
    return twin


def from_copy(twin: Denoise) -> Denoise:
    """The reference that predicts with the frozen copy `twin`, without gradient."""

    def denoise(x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
        with torch.no_grad():
            return twin(x_t, t, text, sizes)

    return denoise


def from_adapters(policy: Denoise, layers: list[BaseTunerLayer]) -> Denoise:
    """The reference that predicts with the policy's adapter `layers` switched off, without gradient."""

    def denoise(x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
        with torch.no_grad(), adapters_off(layers):
            return policy(x_t, t, text, sizes)

    return denoise

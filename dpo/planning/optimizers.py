"""The optimizers of bitsandbytes, whose kernels read memory that a dry run does not have: their states alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # elements with one maximum
MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep fp32 moments
MOMENTS = {"bnb-adamw8bit": 2, "paged-adamw8bit": 2, "lion8bit": 1}
PAGED = ("paged-adamw8bit",)  # states that lie on the host where the GPU is short of memory


class StatesOnly(torch.optim.Optimizer):
    """Makes its states in its first step, as bitsandbytes does, and never changes a weight."""

    def __init__(self, parameters: list[Tensor], kind: str) -> None:
        super().__init__(parameters, {})
        self.moments = MOMENTS[kind]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = {"moments": [self._moment(parameter) for _ in range(self.moments)]}

    def _moment(self, parameter: Tensor) -> list[Tensor]:
        count = parameter.numel()
        if count < MIN_8BIT_ELEMENTS:
            return [torch.empty(count)]
        return [torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // BLOCK))]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the states."""
        return [tensor for state in self.state.values() for moment in state["moments"] for tensor in moment]

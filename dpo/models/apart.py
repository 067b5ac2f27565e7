"""A small denoiser on a CPU: a batch in equal parts, one on each core, forward and backward.

A prediction does not depend on the other samples of a batch, and a gradient is the sum of those of the parts, which are
added in their order: the same bits every time, and those of the whole batch up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo.common.cores import SMALL, Cores
from dpo.models.family import Denoise, TextEncoding

LEAST = 4  # samples of a part: tried, fewer are rounded otherwise than in the whole batch


def cores_for(device: torch.device, *networks: nn.Module) -> Cores | None:
    """The cores that parts of the batches of these go to; None where that gains nothing: a GPU, one core, a large network."""
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        return None
    return Cores(count) if all(sum(p.numel() for p in one.parameters()) <= SMALL for one in networks) else None


@dataclass(frozen=True)
class Apart:
    """A `Denoise` that hands the parts of a batch to another one, from several threads at a time.

    It must keep no state and need no autocast, which is a setting of a thread. The gradient goes to `parameters` alone.
    """

    denoise: Denoise
    cores: Cores
    parameters: Sequence[Tensor]  # those that are trained, fp32 or wider

    def __call__(self, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
        """See `family.Denoise`."""
        samples = len(t)
        size = samples // self.parts(samples)

        def predicted(first: int) -> Tensor:
            rows = slice(first, first + size)
            return self.denoise(x_t[rows], t[rows], text.row(rows), None if sizes is None else sizes[rows])

        starts = range(0, samples, size)
        if len(starts) == 1:
            return predicted(0)
        if torch.is_grad_enabled() and self.parameters:
            return _Trained.apply(self.cores, predicted, starts, *self.parameters)  # type: ignore[no-any-return]
        return torch.cat(self.cores(predicted, starts))

    def parts(self, samples: int) -> int:
        """Into how many equal parts of at least LEAST a batch of so many samples goes."""
        most = min(self.cores.count, samples // LEAST)
        return next((count for count in range(most, 1, -1) if samples % count == 0), 1)


class _Trained(torch.autograd.Function):
    """Predictions of parts on their cores, and in the backward pass the sum of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, cores: Cores, predicted: Callable[[int], Tensor], starts: range, *parameters: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            ctx.predictions = cores(predicted, starts)
        ctx.cores, ctx.parameters = cores, parameters
        return torch.cat([prediction.detach() for prediction in ctx.predictions])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        predictions, ctx.predictions = ctx.predictions, None

        def of_part(part: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            prediction, own = part
            return torch.autograd.grad(prediction, ctx.parameters, own, allow_unused=True)

        of_parts = ctx.cores(of_part, zip(predictions, grad.split(len(predictions[0])), strict=True))
        summed = (None if grads[0] is None else sum(grads[1:], grads[0]) for grads in zip(*of_parts, strict=True))
        return (None, None, None, *summed)

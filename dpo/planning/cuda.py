"""What CUDA does otherwise than the CPU, on whose fake tensors a plan runs: rounding, autocast, and what no tensor shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

BLOCK = 512  # bytes: CUDA's allocator hands out multiples of it

# Under autocast these run in fp32 on CUDA and in half precision on the CPU.
IN_FP32 = {
    torch.group_norm, torch.layer_norm, torch.nn.functional.group_norm, torch.nn.functional.layer_norm,
    torch.softmax, torch.nn.functional.softmax, Tensor.softmax, torch.exp, Tensor.exp, torch.sum, Tensor.sum,
    torch.nn.functional.softplus, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt, torch.cumsum, Tensor.cumsum,
}  # fmt: skip


class _Autocast(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                args, kwargs = tree_map(_wide, (args, kwargs))
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """Inside the block the CPU's autocast follows CUDA's list of what runs in fp32."""
    with _Autocast():
        yield


def recompute_as_cuda(denoiser: nn.Module) -> None:
    """Has blocks that the backward pass computes again follow that list there too, where torch leaves the block above."""
    again = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), _Autocast())
    )
    for module in denoiser.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            setattr(module, "_gradient_checkpointing_func", again)  # noqa: B010  # mypy: a tensor or a module


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


GIB = 2**30
CONTEXT = "CUDA context and kernels (estimate)"
OWN = GIB // 2  # bytes of them
WORKSPACES = "cuBLAS and cuDNN workspaces (estimate)"
GAPS = "gaps of the allocator (estimate)"


def unseen(peak: int) -> dict[str, int]:
    """Bytes beside those of tensors whose peak is `peak`, by what takes them. Estimates: none of them is measured here."""
    return {CONTEXT: OWN, WORKSPACES: GIB // 4, GAPS: round(0.03 * peak)}


# GiB that CUDA has of a card sold with so many GB: of the smallest common one, rounded down (ECC and drivers keep some).
CARDS: dict[float, float] = {8: 7.6, 12: 11.6, 16: 14.6, 24: 22.0, 40: 39.3, 48: 44.4, 80: 79.0, 141: 139.5}
KEPT = 0.07  # of other sizes


def room(card: float) -> float:
    """Bytes that a card of `card` GB has for a process."""
    return CARDS.get(card, card * (1 - KEPT)) * GIB

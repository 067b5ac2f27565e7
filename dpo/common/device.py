"""Tensors from the host to a device and back."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on `device`, in `dtype` where one is given. The host does not wait for a copy to a GPU.

    For a copy to itself it waits: it may read the values at once.
    """
    return x.to(device, dtype, non_blocking=torch.device(device).type != "cpu")

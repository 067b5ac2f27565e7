"""Tensors that are made inside a block: what stands in for a device's memory on a machine without one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the elements of every tensor that an operation inside the block gives new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors(args, kwargs)}
        result = func(*args, **(kwargs or {}))
        for leaf in _tensors(result):
            if leaf.untyped_storage().data_ptr() not in given:
                self.elements += leaf.numel()
                self.largest = max(self.largest, leaf.numel())
        return result


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

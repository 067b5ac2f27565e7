"""What memory a training step takes, by counting the storages that its operations make and let go.

The same count works on real and on fake tensors, which have shapes and no bytes: so a step is measured on a machine that
could never run it. Only what the allocator hands out to tensors is seen; what a library takes inside an operation is not.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

HOST = "host"  # the kind and phase of what lies elsewhere and is not counted
RECOMPUTE = "recompute"  # FLOPs of forwards that run again inside the backward pass


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_attention._get_raw = _attention_backward._get_raw = True  # type: ignore[attr-defined]  # they take tensors, as torch asks
ATTENTION: dict[Any, Callable[..., int]] = {  # on a CPU, which torch's own counter leaves out: counted as on a GPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **ATTENTION}


def blocked(func: Any, args: tuple) -> int:
    """Bytes that a convolution takes on a CPU, where it puts what it reads into a layout of its own (oneDNN, NCHW)."""
    read = {torch.ops.aten.convolution: 1, torch.ops.aten.convolution_backward: 2}.get(func._overloadpacket, 0)
    return sum(tensor.nbytes for tensor in args[:read])


class Lifetimes(TorchDispatchMode):
    """Counts live bytes, their peak and what they were at it, and FLOPs, by the phase that made them.

    block: bytes are rounded up to a multiple of it for each storage. numbers: what is read from a fake tensor, which has
    no value, by phase; 0 in the others. shares: of each storage that lies on this device, by kind; 1 of the others.
    inside: bytes that a library takes while an operation runs, from the operation and its arguments.
    """

    def __init__(
        self,
        block: int = 1,
        numbers: Mapping[str, float] | None = None,
        shares: Mapping[str, float] | None = None,
        inside: Callable[[Any, tuple], int] | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.shares = shares or {}
        self.inside = inside
        self.phase = "other"
        self.live: Counter[str] = Counter()  # bytes by kind
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.numbers = numbers or {}
        self._total = 0
        self._kinds: dict[weakref.ref, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return self._read(args[0])
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), self.phase)
        if self.inside is not None and self._total + (taken := self.inside(func, args)) > self.peak:
            self.peak, self.at_peak = self._total + taken, self.live + Counter({self.phase: taken})
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            again = self.phase == "backward" and torch.is_grad_enabled()  # gradients alone are made without
            self.flops[RECOMPUTE if again else self.phase] += formula(*args, **kwargs, out_val=result)
        return result

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says of what kind the memory of `tensors` is, from here on, whoever made it."""
        for tensor in tensors:
            self._see(tensor.untyped_storage(), kind, again=True)

    def begin(self) -> None:
        """Counts peak and FLOPs from here on."""
        self.peak, self.at_peak = self._total, +self.live
        self.flops.clear()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Inside the block what is made, and the FLOPs, are of `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def named(self, phase: str, function: Callable) -> Callable:
        """`function`, within `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        return call

    def _see(self, storage: torch.UntypedStorage, kind: str, again: bool = False) -> None:
        key = weakref.ref(storage, self._drop)
        there = self._kinds.get(key)
        if there is not None and not again:
            kind = there[0]
        own = math.ceil(storage.nbytes() * self.shares.get(kind, 1))
        size = 0 if kind == HOST else -(-own // self.block) * self.block
        if there == (kind, size):
            return
        self._drop(key)
        self._kinds[key] = kind, size
        self.live[kind] += size
        self._total += size
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, +self.live

    def _drop(self, key: weakref.ref) -> None:
        if (gone := self._kinds.pop(key, None)) is not None:
            self.live[gone[0]] -= gone[1]
            self._total -= gone[1]

    def _read(self, tensor: Tensor) -> Any:
        value = self.numbers.get(self.phase, 0.0)
        return value if tensor.dtype.is_floating_point else int(value)


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)

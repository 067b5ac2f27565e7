"""Activation offload: what autograd saves in the forward pass waits for the backward pass in host memory.

On a GPU both ways are copied on a stream of their own, out of and into pinned memory, while the model computes. Copies
are exact, so gradients are the same bit for bit. With checkpointing little is saved but the inputs of blocks: then the
copies hide best.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST = 2**20  # bytes: smaller tensors stay, a copy of them costs more than it frees
LEAVING = 2  # tensors on their way to the host that may still take device memory


@dataclass(eq=False)
class Moved:
    """A saved tensor in host memory, and where it is on its way back."""

    host: Tensor
    index: int  # in the order of saving
    used: bool = False  # whether backward has asked for it
    arriving: tuple[Tensor, Any] | None = None  # on the device, and the event after its copy


class Offload(saved_tensors_hooks):
    """Around one forward pass on `device`, whose copies run on the stream `side`.

    Parameters of `denoiser`, tensors under `least` bytes and views with gaps stay where they are.
    """

    def __init__(self, denoiser: nn.Module, device: torch.device, side: Any, least: int = LEAST) -> None:
        super().__init__(self._pack, self._unpack)
        self.device = device
        self.side = side
        self.least = least
        self.streams = torch.get_device_module(device)
        self.weights = {_storage(p) for p in denoiser.parameters()}
        self.moved: list[Moved] = []
        self.leaving: deque[tuple[Tensor, Any]] = deque()  # sources of copies that may not have ended

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._release(0)

    def _pack(self, saved: Tensor) -> Tensor | Moved:
        if not self._is_worth_it(saved):
            return saved
        saved = saved.detach()
        moved = Moved(on_host(saved), len(self.moved))
        self.leaving.append((saved, self._copy(moved.host, saved)))
        self.moved.append(moved)
        self._release(LEAVING)
        return moved

    def _unpack(self, packed: Tensor | Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._fetch(packed)
        packed.used = True
        earlier = reversed(self.moved[: packed.index])
        if (following := next((moved for moved in earlier if not moved.used), None)) is not None:
            self._fetch(following)  # what backward most likely asks for next
        assert packed.arriving is not None, "fetched above"
        (tensor, arrived), packed.arriving = packed.arriving, None
        self._wait(arrived)
        return tensor

    def _is_worth_it(self, saved: Tensor) -> bool:
        dense = saved.is_contiguous() or (saved.dim() == 4 and saved.is_contiguous(memory_format=torch.channels_last))
        large = saved.numel() * saved.element_size() >= self.least
        return large and dense and saved.device.type == self.device.type and _storage(saved) not in self.weights

    def _fetch(self, moved: Moved) -> None:
        """Begins the copy back to the device, where it has not begun."""
        if moved.arriving is None:
            tensor = torch.empty_like(moved.host, device=self.device)
            moved.arriving = tensor, self._copy(tensor, moved.host)

    def _release(self, most: int) -> None:
        """Lets sources go until `most` are left. What then takes their memory waits, on the device, for the copy."""
        while len(self.leaving) > most:
            self._wait(self.leaving[0][1])
            self.leaving.popleft()

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        """Begins a copy after all that is queued, copies before it included; the event of its end."""
        self.side.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.side), torch.no_grad():
            target.copy_(source, non_blocking=True)
            return self.side.record_event()

    def _wait(self, event: Any) -> None:
        """What is queued from here on starts after `event`; the host does not wait."""
        self.streams.current_stream(self.device).wait_event(event)


def on_host(saved: Tensor) -> Tensor:
    """Host memory for `saved`, in its layout; pinned where that makes copies to and from a GPU run beside its work."""
    return torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)


def use_offload(denoiser: nn.Module, device: torch.device, least: int = LEAST) -> None:
    """Makes every forward of `denoiser` that is differentiated keep its saved tensors in host memory.

    least: bytes of the smallest tensor that is moved.
    """
    forward, side = denoiser.forward, torch.get_device_module(device).Stream()

    @functools.wraps(forward)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with Offload(denoiser, device, side, least):
            return forward(*args, **kwargs)

    denoiser.forward = offloading


def _storage(x: Tensor) -> int:
    """What two tensors on the same memory have in common; tensors without memory have it too."""
    return x.untyped_storage()._cdata

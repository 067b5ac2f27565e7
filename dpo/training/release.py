"""Gradient release: the optimizer's update inside backward, one parameter at a time.

A parameter is updated as soon as its gradient is whole, and the gradient is freed at once: the gradients of all
parameters are never in memory together. What that costs:

- an update is one micro-batch, since nothing is left to add the next one's gradients to;
- the norm of all gradients is known only at the end, so they are clipped by the norm of the update before. The first
  update of a run is not clipped;
- weights change before the gradients are known to be finite. A loss that is not finite updates nothing. A gradient
  that is not finite leaves its own parameter as it is, and the others are updated.

Nothing here waits for the device.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from csrc_triton.adamw8bit import AdamW8bit


class Release:
    """Updates `parameters` by `optimizer` inside `backward`; the optimizer is AdamW8bit or a fused torch.optim.AdamW.

    Without clipping the weights are bit for bit those of an update after backward.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor], max_grad_norm: float) -> None:
        """max_grad_norm: as in Updater; 0: no clipping. Every gradient that autograd makes for them updates from now on."""
        self.optimizer = optimizer
        self.parameters = parameters
        self.max_grad_norm = max_grad_norm
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        device = parameters[0].device
        self.norms = torch.zeros(len(parameters), dtype=wide, device=device)  # of the gradients of this update
        self.before = torch.zeros((), dtype=wide, device=device)  # the norm that clips; 0: not known, no clipping
        self._clip = torch.ones((), dtype=wide, device=device)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)  # whether the loss is not finite
        self._share = 1.0
        for key, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._update, key))

    def backward(self, loss: Tensor, lr: float, share: float) -> None:
        """One update from the 0-d `loss` at learning rate `lr`; share: usable over nominal pairs, 0: nothing changes."""
        self.norms.zero_()
        if not share:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._share = share
        self._broken = ~loss.detach().isfinite()
        if self.max_grad_norm > 0:
            clip = (self.max_grad_norm / (self.before + 1e-6)).clamp(max=1.0)
            self._clip = torch.where(self.before > 0, clip, 1.0)
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.begin(self._broken.float())
        loss.backward()
        norm = torch.linalg.vector_norm(torch.where(self.norms.isfinite(), self.norms, 0.0))
        self.before = torch.where((norm > 0) & ~self._broken, norm, self.before)

    @property
    def norm(self) -> Tensor:
        """The norm of all gradients of the last `backward`, 0-d; not finite where one of them is not."""
        return torch.linalg.vector_norm(self.norms)

    def skipped(self) -> int:
        """Parameters whose gradient was not finite in the last `backward`. Waits for the device."""
        return int((~self.norms.isfinite()).sum())

    @torch.no_grad()
    def _update(self, key: int, parameter: Tensor) -> None:
        """Updates a parameter by its gradient, which is whole, and frees that."""
        assert parameter.grad is not None, "autograd calls this when it has made the gradient"
        if self._share != 1.0:
            torch._foreach_mul_([parameter.grad], 1.0 / self._share)  # rounds as Updater.grad_norm does
        norm = torch.linalg.vector_norm(parameter.grad, dtype=self.norms.dtype)
        self.norms[key] = norm
        skip = (self._broken | ~norm.isfinite()).float()
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.step_one(key, clip=self._clip, found_inf=skip)
        else:
            if self.max_grad_norm > 0:
                parameter.grad.mul_(self._clip)
            self._step_alone(parameter, skip)
        parameter.grad = None

    def _step_alone(self, parameter: Tensor, skip: Tensor) -> None:
        """torch's AdamW on one parameter: its step would look at every one, in each of as many calls."""
        (group,) = self.optimizer.param_groups
        every = group["params"]
        group["params"] = [parameter]
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # how torch's GradScaler hands it to a fused step
        try:
            self.optimizer.step()
        finally:
            group["params"] = every

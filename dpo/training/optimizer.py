"""The update: optimizers, learning-rate schedules, clipping, loss scaling and the averaged weights."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from csrc_triton.adamw8bit import AdamW8bit
from csrc_triton.parts import Part
from dpo.common.errors import UserError
from dpo.training.release import Release

if TYPE_CHECKING:
    from dpo.training.sharding import Shards

log = logging.getLogger("dpo")

OF_BITSANDBYTES = ("bnb-adamw8bit", "paged-adamw8bit", "lion8bit")  # values of --optimizer that need that package


def check_installed(kind: str) -> None:
    """Raises UserError where --optimizer `kind` needs a package that is not there."""
    if kind in OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--optimizer {kind} needs the package bitsandbytes, which is not installed: pip install bitsandbytes, or use "
            "--optimizer adamw8bit, our own 8-bit AdamW, which needs none"
        )


def learning_rate(
    step: int, *, peak: float, warmup: int, steps: int, scheduler: str, start: Literal["step", "zero"] = "step"
) -> float:
    """The learning rate of update `step`, counted from 0: linear warm-up to `peak`, then constant, linear or cosine.

    Linear and cosine end at 0. warmup: updates of the warm-up; steps: updates of the whole run. start: whether the
    warm-up begins with its first step, peak / warmup, or with 0, as diffusers' schedules do.
    """
    if step < warmup:
        return peak * (step + (start == "step")) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return (
        peak * {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[scheduler]
    )


def averaging_decay(decay: float, done: int) -> float:
    """The decay of the averaged weights in an update after `done` others: it warms up.

    With a plain decay of 0.9999 the weights before training would still count 82 % after 2000 updates. The rule is
    that of TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + done) / (10 + done))


def build(
    kind: str,
    parameters: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int = 0,
    parts: Sequence[Part] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that --optimizer calls `kind`; a fallback is logged.

    `seed` keys AdamW8bit's stochastic rounding; parts: of what whole tensors the parameters are shards.
    """
    adam: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    on_gpu = parameters[0].is_cuda
    if kind == "adamw":
        return torch.optim.AdamW(parameters, **adam, fused=True)
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False
        )
    if kind == "adamw8bit":
        return AdamW8bit(parameters, **adam, seed=seed, parts=parts)
    import bitsandbytes as bnb

    if kind == "paged-adamw8bit" and not on_gpu:
        log.warning("paged-adamw8bit pages between GPU and host memory; on the CPU it is plain bnb-adamw8bit")
        kind = "bnb-adamw8bit"
    if kind == "lion8bit":
        return bnb.optim.Lion8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return {"bnb-adamw8bit": bnb.optim.AdamW8bit, "paged-adamw8bit": bnb.optim.PagedAdamW8bit}[kind](parameters, **adam)


def accumulate_in_fp32(parameters: list[Tensor]) -> int:
    """Makes autograd add the gradients of bf16 parameters in fp32; the bytes that these gradients then take.

    In bf16 a sum over many passes loses what is below 1/256 of it.
    """
    narrow = [p for p in parameters if p.dtype == torch.bfloat16]
    for parameter in narrow:
        parameter.grad_dtype = torch.float32
    return sum(4 * p.numel() for p in narrow)


@dataclass
class Updater:
    """Turns summed gradients into an update.

    Gradients arrive as sums over pairs divided by the nominal batch (and, under fp16, times the loss scale).
    `grad_norm` brings them to the mean over usable pairs; `update` clips their global norm and steps. With a `release`
    all that is done inside `backward`.
    """

    names: list[str]  # of the parameters, in the denoiser
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    scaler: torch.amp.GradScaler | None = None
    ema_decay: float = 0.0
    ema: list[Tensor] = field(default_factory=list)  # averaged weights in fp32 or wider; empty without averaging
    release: Release | None = None  # where each parameter is updated inside backward
    shards: Shards | None = None  # where the parameters are this process's rows of them
    keeps_gradients: bool = False  # dropped gradients are zeroed where they are: a CUDA graph adds to them there

    def __post_init__(self) -> None:
        if self.ema_decay > 0 and not self.ema:
            self.ema = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.parameters]

    def backward(self, loss: Tensor, lr: float | None = None, share: float = 1.0) -> None:
        """Adds the gradients of a micro-batch's loss; under fp16 times the loss scale.

        With a `release` it makes the update, at learning rate `lr`; share: usable over nominal pairs, as in `grad_norm`.
        """
        if self.release is not None:
            assert lr is not None, "gradient release updates inside backward: it needs the learning rate there"
            self.release.backward(loss, lr, share)
            return
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.shards is not None:
            self.shards.collect()

    @torch.no_grad()
    def grad_norm(self, share: float) -> Tensor:
        """Unscales the gradients, divides them by `share` (usable over nominal pairs); their global norm, 0-d."""
        if self.release is not None:
            return self.release.norm
        if not share:  # no usable pair: the gradients are zero, and no step follows
            return torch.zeros((), device=self.parameters[0].device)
        if self.shards is not None:
            self.shards.reduce()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if share != 1.0:
            torch._foreach_mul_(grads, 1.0 / share)
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms = torch._foreach_norm(grads, 2, dtype=wide)
        return torch.linalg.vector_norm(torch.stack(norms)) if self.shards is None else self.shards.norm(norms)

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor, done: int = 0) -> None:
        """One optimizer step at learning rate `lr`, clipped by `norm`, the global norm from `grad_norm`.

        Also updates the averaged weights, and drops the gradients. done: updates made before this one. With a `release`
        the step is already made.
        """
        if self.release is None:
            self._clipped_step(lr, norm)
        if self.ema:
            torch._foreach_lerp_(
                self.ema,
                [p.detach().to(e.dtype) for p, e in zip(self.parameters, self.ema, strict=True)],
                1 - averaging_decay(self.ema_decay, done),
            )
        self.drop()

    def _clipped_step(self, lr: float, norm: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_grad_norm > 0 else None
        if isinstance(self.optimizer, AdamW8bit) and self.scaler is None:
            self.optimizer.step(clip=clip)  # the factor is applied inside: no pass over the gradients
        else:
            if clip is not None:
                torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], clip)
            self._step()

    def _step(self) -> None:
        """The optimizer's own step; under fp16 the scaler skips it when a gradient overflowed."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    @contextmanager
    def averaged(self) -> Iterator[list[Tensor]]:
        """Inside the block the parameters are the averaged weights, which are the result; without averaging, no change.

        Yields the weights in training, whose places those have taken; none without averaging. The tensors change
        places, and nothing is copied but to round the average to the parameters' dtype. Shards keep their place: what
        changes is what they hold.
        """
        live = [p.data if self.shards is None else p.data.clone() for p in self.parameters] if self.ema else []
        try:
            self._take([e.to(p.dtype) for p, e in zip(self.parameters, self.ema, strict=False)])
            yield live
        finally:
            self._take(live)

    @torch.no_grad()
    def _take(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=False):
            if self.shards is None:
                p.data = value
            else:
                p.copy_(value)

    def drop(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        if self.shards is not None:
            self.shards.drop()

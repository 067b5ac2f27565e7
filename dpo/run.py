"""A run in progress: what an update needs and where it stands; its checkpoints, written and put back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo import checkpoint, decisions, objective, optimizer, record, schedule, validation
from dpo.config import Config, flatten, from_mapping
from dpo.correction import CorrectionTable
from dpo.data import Source, batches
from dpo.errors import UserError
from dpo.metrics import StepMetrics
from dpo.models import Components
from dpo.step import Encoder, PairStep

log = logging.getLogger("dpo")


class Diverged(UserError):
    """The loss or the gradient is no longer a number; the weights are still those before this update."""


@dataclass(frozen=True)
class Speed:
    """Counted FLOPs of training on one pair, and the device's peak, for the figures that tell how well it is used."""

    pair_flops: float
    peak_tflops: float | None

    def figures(self, pairs_per_second: float) -> dict[str, float | None]:
        tflops = self.pair_flops * pairs_per_second / 1e12
        return {"tflops": tflops, "mfu": tflops / self.peak_tflops if self.peak_tflops else None}


@dataclass
class Run:
    """Everything an update needs, and where the run stands."""

    config: Config
    model: Components
    source: Source
    encoder: Encoder
    step: PairStep
    updater: optimizer.Updater
    table: CorrectionTable
    held_out: validation.HeldOut | None
    output: Path
    fingerprints: dict[str, str]
    schedule: schedule.Schedule
    total: int  # updates wanted
    speed: Speed
    device: torch.device
    metrics: StepMetrics = field(default_factory=StepMetrics)
    held_out_source: Source | None = None
    done: int = 0  # updates made
    position: int = 0  # pairs consumed, holes included
    started: float = 0.0  # seconds since the epoch
    recorded: record.RecordedErrors | None = None  # the reference's errors, where no reference model is held
    evaluation: dict[str, Any] = field(default_factory=dict)  # what judging the result gave, where a judge is at hand

    @property
    def nominal(self) -> int:
        """Pairs per update, holes included."""
        return self.config.optim.effective_batch

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def learning_rate(self) -> float:
        optim = self.config.optim
        return optimizer.learning_rate(
            self.done, peak=decisions.learning_rate(self.config), warmup=optim.warmup, steps=self.total, scheduler=optim.scheduler
        )

    def correction(self) -> Tensor:
        """C [T] of DDE as it stands at the start of an update (all zero for the other methods)."""
        return self.table.correction().to(self.step.weight.dtype)

    def tables(self, correction: Tensor) -> dict[str, Tensor]:
        """M and C [T] for the figures, where the method has them."""
        stepwise = objective.METHODS[self.config.method.method].correction
        return {"table": self.table.table, "correction": correction} if stepwise else {}

    def drop(self) -> None:
        """Forget the update in progress."""
        self.updater.drop()
        self.table.discard()
        self.metrics = StepMetrics()

    def check_finite(self, figures: dict[str, Any]) -> None:
        """Raise Diverged, with the step and timesteps, before a loss or gradient that is not a number reaches the weights."""
        scaled = self.updater.scaler is not None  # an infinite gradient is how the loss scale finds its level
        if figures["nonfinite_timesteps"] or (figures["grad_norm"] is None and figures["pairs"] and not scaled):
            self.drop()
            at = ", ".join(map(str, figures["nonfinite_timesteps"][:8])) or "none in the loss, only in the gradient"
            raise Diverged(
                f"update {self.done + 1} gave a loss or gradient that is not finite (timesteps: {at}); the state before it is saved: "
                "lower --learning-rate, or use --precision bf16 or fp32, and --resume latest; if that fails at once, resume an earlier checkpoint "
                "or start anew with --overwrite"
            )

    def batches(self) -> Iterator[Any]:
        """Micro-batches from the run's position on, without end."""
        data, optim = self.config.data, self.config.optim
        return batches(
            self.source,
            data,
            seed=self.config.runtime.seed,
            start=self.position,
            micro_batch=optim.batch_size,
            resolution=data.resolution,
            workers=data.workers,
            recorded=self.recorded,
        )


def snapshot(run: Run) -> Path:
    """Write the checkpoint of the run as it stands, and drop the oldest ones beyond the limit."""
    optimizer_tensors, optimizer_rest = checkpoint.pack(run.updater.optimizer.state_dict())
    names = run.updater.names
    tensors = {
        "policy": dict(zip(names, run.updater.parameters, strict=True)),
        "optimizer": optimizer_tensors,
        "tables": {"correction": run.table.table},
        "ema": dict(zip(names, run.updater.ema, strict=True)) if run.updater.ema else {},
    }
    state = {
        "step": run.done,
        "position": run.position,
        "config": flatten(run.config),
        "fingerprints": run.fingerprints,
        "optimizer": optimizer_rest,
        "scaler": run.updater.scaler.state_dict() if run.updater.scaler else None,
        "versions": {"torch": torch.__version__},
    }
    path = checkpoint.save(checkpoint.folder_of(run.checkpoints, run.done), tensors, state)
    checkpoint.prune(run.checkpoints, run.config.output.checkpoints_limit)
    return path


def check_resume(config: Config, saved: checkpoint.Checkpoint) -> None:
    """Say what changed since the checkpoint; refuse what would silently make another run of it."""
    allowed, refused = decisions.resume_changes(from_mapping(saved.state["config"]), config)
    if refused:
        raise UserError(f"cannot resume {saved.path} with other settings: {', '.join(refused)}; set them back or start anew")
    for line in allowed:
        log.warning("changed on resume: %s", line)


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Put a checkpoint into a freshly built run, exactly; training goes on at its next batch."""
    state, tensors = saved.state, saved.tensors
    if state["fingerprints"]["model"] != run.fingerprints["model"]:
        raise UserError(f"{saved.path} was trained from another model than {run.config.model.model}; name that one or start anew")
    if state["fingerprints"]["data"] != run.fingerprints["data"]:
        log.warning(
            "the training pairs differ from the checkpoint's: their order starts from position %d of the new set",
            state["position"],
        )
    updater = run.updater
    checkpoint.copy_into(dict(zip(updater.names, updater.parameters, strict=True)), tensors["policy"], "policy")
    if updater.ema:
        checkpoint.copy_into(dict(zip(updater.names, updater.ema, strict=True)), tensors["ema"], "averaged weights")
    checkpoint.load_optimizer(updater.optimizer, tensors.get("optimizer", {}), state["optimizer"])
    if updater.scaler is not None and state["scaler"]:
        updater.scaler.load_state_dict(state["scaler"])
    run.table.table.copy_(tensors["tables"]["correction"])
    run.done, run.position = state["step"], state["position"]
    log.info("resumed %s: %d updates done, %d pairs seen", saved.path, run.done, run.position)

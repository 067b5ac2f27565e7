"""A run in progress: what an update needs and where it stands."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.correction import CorrectionTable
from dpo.data.batch import Decoding, PairBatch
from dpo.data.batches import batches
from dpo.data.loader import Reading
from dpo.data.order import Order
from dpo.data.pairs import Source
from dpo.data.store import recorded
from dpo.encode import Encoder
from dpo.methods import METHODS
from dpo.models.family import Model
from dpo.pages.folder import CHECKPOINTS
from dpo.settings import resolve
from dpo.settings.config import Config
from dpo.step import PairStep
from dpo.training import optimizer, validation
from dpo.training.metrics import StepMetrics

log = logging.getLogger("dpo")
Figures: TypeAlias = dict[str, Any]  # an update's figures, as in metrics.jsonl: numbers and lists of numbers by name


class Diverged(UserError):
    """The loss or the gradient is not finite; the weights are still those before this update."""


@dataclass(frozen=True)
class Speed:
    """Counted FLOPs of training on one pair, and the device's peak, for the figures on how well the device is used."""

    pair_flops: float
    peak_tflops: float | None  # None for a device without a known peak

    def figures(self, pairs_per_second: float) -> Figures:
        """TFLOP/s, and model FLOPs utilisation (the share of the peak; None without a peak)."""
        tflops = self.pair_flops * pairs_per_second / 1e12
        return {"tflops": tflops, "mfu": tflops / self.peak_tflops if self.peak_tflops else None}


@dataclass
class Run:
    """Everything an update needs, and where the run stands."""

    config: Config
    model: Model
    source: Source
    encoder: Encoder
    step: PairStep
    updater: optimizer.Updater
    table: CorrectionTable
    held_out: validation.HeldOut | None
    output: Path
    fingerprints: dict[str, str]
    total: int  # updates wanted
    speed: Speed
    device: torch.device
    metrics: StepMetrics = field(default_factory=StepMetrics)
    held_out_source: Source | None = None
    done: int = 0  # updates made
    complete: bool = False  # all updates were made before this process: its settings trained nothing
    resumed: Path | None = None  # the checkpoint that it goes on from
    position: int = 0  # pairs consumed, holes included
    whole: bool = True  # False while weights, table and counters are not all of the same update
    started: float = 0.0  # seconds since the epoch
    recorded: recorded.RecordedErrors | None = None  # the reference's errors, where they replace a reference model

    @property
    def nominal(self) -> int:
        """Pairs per update, holes included."""
        return self.config.optim.effective_batch

    @property
    def checkpoints(self) -> Path:
        return self.output / CHECKPOINTS

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        optim = self.config.optim
        return optimizer.learning_rate(
            self.done,
            peak=resolve.learning_rate(self.config),
            warmup=optim.warmup,
            steps=self.total,
            scheduler=optim.scheduler,
            start="zero" if optim.warmup_start == "zero" else "step",
        )

    def correction(self) -> Tensor:
        """DDE's correction C [T] at the start of an update, in the dtype of the weight; 0 for the other methods."""
        return self.table.correction().to(self.step.weight.dtype)

    def tables(self, correction: Tensor) -> dict[str, Tensor]:
        """DDE's table M and C [T] for the figures; empty for a method without the stepwise correction."""
        stepwise = METHODS[self.config.method.method].correction
        return {"table": self.table.table, "correction": correction} if stepwise else {}

    def count(self) -> None:
        """Counts the update that was made."""
        self.whole = False
        self.done += 1
        self.position += self.nominal
        self.whole = True

    def drop(self) -> None:
        """Drops the gradients, sums and metrics of the update in progress."""
        self.updater.drop()
        self.table.discard()
        self.metrics = StepMetrics()

    def check_finite(self, figures: Figures) -> None:
        """Raises Diverged, naming the timesteps, for a loss or gradient that is not finite: no weight has changed."""
        scaled = self.updater.scaler is not None  # under a loss scale infinite gradients are normal: they lower it
        if figures["nonfinite_timesteps"] or (figures["grad_norm"] is None and figures["pairs"] and not scaled):
            if not figures["nonfinite_timesteps"] and self._released():
                return
            self.whole = self.whole or bool(figures["nonfinite_timesteps"])  # such a loss is never released
            self.drop()
            at = ", ".join(map(str, figures["nonfinite_timesteps"][:8])) or "none in the loss, only in the gradient"
            broken = f"update {self.done + 1} gave a loss or gradient that is not finite (timesteps: {at})"
            if not self.done:
                raise Diverged(f"{broken}, and no weight has changed yet: {self._other_causes()}")
            raise Diverged(
                f"{broken}; {'the state before it is saved: ' if self.whole else ''}"
                "lower --learning-rate, or use --precision bf16 or fp32, and --resume latest, which goes on from the last "
                "checkpoint before; if that fails too, resume an earlier checkpoint "
                "or start anew with --overwrite"
            )

    def _released(self) -> bool:
        """Whether gradient release updated a part of the weights all the same, which is then logged."""
        release = self.updater.release
        if release is None or not 0 < (skipped := release.skipped()) < len(self.updater.parameters):
            return False
        log.warning(
            "update %d: the gradient of %d of %d parameters was not finite: they keep their weights, the others were updated",
            self.done + 1, skipped, len(self.updater.parameters),
        )  # fmt: skip
        return True

    def _other_causes(self) -> str:
        """What to do where the learning rate cannot be the cause, in words."""
        config = self.config
        others = {"fp32": "", "fp64": "", "fp16": "use --precision bf16 or fp32, or "}
        precision = others.get(config.runtime.precision, "use --precision fp32, or ")
        return (
            f"{precision}mend the weights of --model {config.model.model} or the images of --data {config.data.data}, "
            "then start anew with --overwrite"
        )

    def batches(self) -> Generator[PairBatch, None, None]:
        """Micro-batches from the run's position on, without end. Close the generator to end its workers or thread."""
        data, seed = self.config.data, self.config.runtime.seed
        order = Order(seed, self.position, self.config.optim.batch_size)
        return batches(self.source, order, Decoding.of(data, seed), Reading.of(data), self.recorded)

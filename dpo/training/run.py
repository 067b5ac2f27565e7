"""A run in progress: what an update needs and where it stands."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.correction import CorrectionTable
from dpo.data.batch import Decoding, PairBatch
from dpo.data.batches import batches
from dpo.data.buckets import Buckets
from dpo.data.kept import Kept
from dpo.data.loader import Reading, look_after
from dpo.data.order import Order
from dpo.data.pairs import Source, things
from dpo.data.store import recorded
from dpo.encode import Encoder
from dpo.methods import METHODS
from dpo.models.family import Model
from dpo.pages.folder import CHECKPOINTS
from dpo.settings import resolve
from dpo.settings.config import Config
from dpo.step import PairStep
from dpo.training import agreement, flops, optimizer, validation
from dpo.training.cost import Cost
from dpo.training.graph import Graphs
from dpo.training.metrics import StepMetrics
from dpo.training.parallel import Processes, Reduced
from dpo.training.strength import Centre, Strength

if TYPE_CHECKING:
    from dpo.training.best import Best

log = logging.getLogger("dpo")
Figures: TypeAlias = dict[str, Any]  # an update's figures, as in metrics.jsonl: numbers and lists of numbers by name


class Diverged(UserError):
    """The loss or the gradient is not finite; the weights are still those before this update."""


@dataclass(frozen=True)
class Speed:
    """Counted FLOPs of training on one pair, and the device's peak, for the figures on how well the device is used."""

    pair_flops: float
    peak_tflops: float | None  # None for a device without a known peak
    encode_flops: float = 0.0  # the part of pair_flops that a pair kept in memory does without

    @classmethod
    def of(cls, counted: Cost, device: torch.device) -> Speed:
        """From the FLOPs that were counted and the device that computes them."""
        peak = flops.peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return cls(counted.pair, peak, encode_flops=counted.pair - counted.kept)

    def figures(self, pairs_per_second: float, kept: float = 0.0) -> Figures:
        """TFLOP/s, and model FLOPs utilisation (the share of the peak; None without a peak).

        kept: the share of the pairs that were taken from memory instead of being encoded.
        """
        tflops = (self.pair_flops - kept * self.encode_flops) * pairs_per_second / 1e12
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
    metrics: StepMetrics
    held_out_source: Source | None = None
    done: int = 0  # updates made
    complete: bool = False  # all updates were made before this process: its settings trained nothing
    resumed: Path | None = None  # the checkpoint that it goes on from
    position: int = 0  # pairs consumed, holes included
    whole: bool = True  # False while weights, table and counters are not all of the same update
    started: float = 0.0  # seconds since the epoch
    recorded: recorded.RecordedErrors | None = None  # the reference's errors, where they replace a reference model
    processes: Processes = field(default_factory=Processes)
    stop: threading.Event = field(default_factory=threading.Event)  # set where this process was asked to stop
    stopping: bool = False  # one of several processes was asked to stop during the last update
    best: Best | None = None  # the best weights so far, where they become the result
    measured: int = 0  # the update after which the held-out accuracy was last asked for
    shown: int | None = None  # the update whose weights these are, where they are the best and not the last
    whole_weights: dict[str, Tensor] | None = None  # of shards: of the result, on the host of the first process
    compared: bool = False  # whether the processes were found to agree since this one started
    buckets: Buckets | None = None  # the shapes of the pairs, where not all are squares
    kept: Kept | None = None  # encoded pairs in memory, where they are wanted
    unread: dict[int, str] = field(default_factory=dict)  # of several processes: unusable pairs in this update, by key
    bad: dict[int, str] = field(default_factory=dict)  # and in those before, of all processes
    following: list[Strength | Centre] = field(default_factory=list)  # what follows the updates made
    graphs: Graphs | None = None  # forward and backward of a micro-batch as CUDA graphs

    @property
    def nominal(self) -> int:
        """Pairs per update over all processes, holes included."""
        return self.config.optim.pairs

    @property
    def things(self) -> str:
        """What it is trained on, in words."""
        return things(self.source)

    @property
    def ended(self) -> bool:
        """Whether no update follows, though not all were made: held-out accuracy has not risen for long."""
        return self.best is not None and self.best.ended

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
        """DDE's correction C at the start of an update, in the dtype of the weight; 0 for the other methods.

        [T], or [1 + shapes, T] where shapes have noise levels of their own, as PairStep takes it.
        """
        others = (levels.precision for levels in self.step.shaped.values())
        return self.table.correction(*others).to(self.step.weight.dtype)

    def tables(self, correction: Tensor) -> dict[str, Tensor]:
        """DDE's table M and C [T] for the figures; empty for a method without the stepwise correction.

        C is that of the square where each shape has one.
        """
        stepwise = METHODS[self.config.method.method].correction
        return (
            {"table": self.table.table, "correction": correction.view(-1, self.table.table.numel())[0]}
            if stepwise
            else {}
        )

    def count(self) -> None:
        """Counts the update that was made."""
        self.whole = False
        self.done += 1
        self.position += self.nominal
        self.whole = True

    def gather(self, usable: int) -> int:
        """Ends an update's passes: table sums, metrics, usable pairs and unusable images, of all processes.

        usable: pairs of this process. Returns those of all. Raises UserError where too many images cannot be used, or
        the processes do not agree on gradients, weights or optimizer states, which is looked at now and then.
        """
        if self.processes.count == 1:
            return usable
        if isinstance(self.step.policy, Reduced):
            self.step.policy.finish()
        parts = [self.table.sums, self.table.counts, rows := self.metrics.take()]
        numbers = torch.tensor([usable, self.stop.is_set(), len(self.unread)])
        packed = torch.cat([part.double().reshape(-1) for part in (*parts, numbers.to(rows.device))])
        found = self.processes.tensors(packed).split([part.numel() for part in (*parts, numbers)], dim=1)
        for total, share in zip((self.table.sums, self.table.counts), found):
            total.copy_(sum(share.unbind()))
        # Micro-batch j of the update is number j // count of process j % count: back into the order of one process.
        dealt = found[2].view(self.processes.count, len(rows), -1, self.config.optim.batch_size)
        self.metrics.put(dealt.permute(1, 2, 0, 3).reshape(len(rows), -1).to(rows.dtype))
        usable, asked, unread = found[3].sum(0).long().tolist()
        self.stopping = bool(asked)
        if unread:
            each = self.processes.objects(self.unread)
            self.unread = {}
            look_after(
                [item for share in each for item in share.items()], self.bad, self.source, Reading.of(self.config.data)
            )
        if not self.compared or self.done % agreement.EVERY == 0:
            agreement.check_state(self.processes, self.updater)
            self.compared = True
        return usable

    def drop(self) -> None:
        """Drops the gradients, sums and metrics of the update in progress."""
        self.updater.drop()
        self.table.discard()
        self.metrics = StepMetrics(self.metrics.timestep_count)
        self.unread = {}

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
        """This process's micro-batches from the run's position on, without end.

        Close the generator to end its workers or thread.
        """
        data, seed, count = self.config.data, self.config.runtime.seed, self.processes.count
        reading = replace(Reading.of(data), shared=count > 1)
        order = self.order(self.position)
        found = batches(self.source, order, Decoding.of(data, seed), reading, self.recorded, self.kept)
        return found if count == 1 else self._dealt(found)

    def order(self, start: int, stop: int | None = None) -> Order:
        """The order of this process's micro-batches from one position to another; None: without end."""
        return Order(
            self.config.runtime.seed,
            start,
            self.config.optim.batch_size,
            stop,
            self.processes.rank,
            self.processes.count,
            self.nominal,
            self.buckets,
        )

    def _dealt(self, found: Generator[PairBatch, None, None]) -> Generator[PairBatch, None, None]:
        """The micro-batches of one of several processes, which looks after the others and what nobody could read."""
        with closing(found):
            for batch in found:
                self.processes.look()
                self.unread |= {key: why for key, why in batch.bad if key not in self.bad}
                yield batch

    def reduces(self, last: bool) -> None:
        """Before a pass: whether it is the update's last, in whose backward the gradients are summed over the processes.

        Not when its batch is read: an encoder that travels reads others ahead.
        """
        policy = self.step.policy
        if isinstance(policy, Reduced):  # shards are summed in every pass: nobody has room for whole gradients
            policy.reduces(last)

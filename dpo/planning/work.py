"""A plan: what a run of some settings will take in memory, FLOPs, hours and disk."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.data import held_out
from dpo.data.pairs import BadImage, Labelled, Pair, Source
from dpo.data.sources import open_source
from dpo.data.store.store import is_store, read_contents
from dpo.methods import METHODS
from dpo.models.ready import decide
from dpo.pages.folder import METRICS_FILE, read_records
from dpo.planning import cuda
from dpo.planning.asked import Asked, peak_of
from dpo.planning.dry import Taken, TrainStep, dry_step
from dpo.planning.sketch import sketch
from dpo.settings import advice
from dpo.settings.config import Config, Data, change
from dpo.settings.resolve import DeviceFacts, dealt, total_steps
from dpo.training import cost
from dpo.training.embedded import NAME, embedded

log = logging.getLogger("dpo")

Dry = Callable[[Config], tuple[Config, Taken]]
PARTS = ("weights", "gradients", "optimizer", "averaged weights", "reference", "activations", "VAE and text encoders")
TEMPORARY = "temporary"
GATHERED = "gathered blocks of shards (estimate)"
ENCODING = ("VAE", "text encoders")  # FLOPs that a pair whose encoding is kept does without
FLOPS = {  # what the dry run calls a part, and what it is
    "VAE": "VAE",
    "text encoders": "text encoders",
    "activations": "policy, forward",
    "recompute": "policy, recomputed",
    "backward": "policy, backward",
    "reference's forward": "reference, forward",
}


@dataclass(frozen=True)
class Speed:
    """How fast it goes, and from where that is known."""

    pairs_per_s: float
    told: str
    kept_pairs_per_s: float  # of pairs whose encodings are kept


class Numbered(Labelled):
    """Pairs of which the number alone is known."""

    def __getitem__(self, index: int) -> Pair:
        raise BadImage("pairs that are only counted have no images")

    def caption_keys(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int64)


class Pairs(NamedTuple):
    """Of a data set: how many there are, and how many of them a run trains on."""

    all: int
    trained: int


@dataclass(frozen=True)
class Plan:
    config: Config  # decided
    taken: Taken
    memory: dict[str, int]  # bytes at the peak of an update, by part
    flops: dict[str, float]  # of a pair, by part
    nominal: int  # pairs of an update, over all processes
    pairs: Pairs | None  # None where not known
    steps: int | None  # updates; None where they follow from a number of pairs that is not known
    encoded: int | None  # pairs of the run that are encoded; None where its length or its pairs are not known
    speed: Speed | None
    disk: dict[str, float]  # bytes, by what is written

    @property
    def gpu(self) -> bool:
        return self.config.runtime.device != "cpu"

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())

    @property
    def things(self) -> str:
        """What is trained on, in words."""
        return "pairs" if self.taken.sides == 2 else "images"

    @property
    def epochs(self) -> float | None:
        return None if self.steps is None or self.pairs is None else self.steps * self.nominal / self.pairs.trained

    @property
    def warnings(self) -> list[str]:
        """What a run says of its length, where that can be told."""
        return [] if self.pairs is None else advice.too_long(self.config, self.pairs.trained, self.things)

    @property
    def pair_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def seconds(self) -> float | None:
        """Of one update."""
        return self.nominal / self.speed.pairs_per_s if self.speed else None

    @property
    def total(self) -> float | None:
        """Seconds of all updates; of those whose encodings are kept without the encoding. None where not known."""
        if self.speed is None or self.steps is None:
            return None
        seen = self.steps * self.nominal
        encoded = seen if self.encoded is None else self.encoded
        return encoded / self.speed.pairs_per_s + (seen - encoded) / self.speed.kept_pairs_per_s


def prepared(config: Config) -> Config:
    """`config` with the embedded world, or its store, taken in.

    A recorded reference comes with a store, which need not be made yet.
    """
    config = embedded(config)
    if config.runtime.reference == "recorded":
        config = change(config, data_format="store")
    folder = Path(config.data.data or "").expanduser()
    if not is_store(folder):
        return config
    resolution = config.data.resolution or read_contents(folder).settings["resolution"]
    return change(config, data_format="store", resolution=resolution)


def pairs_of(config: Config) -> Pairs | None:
    """The pairs of a run, counted as the run counts them; None where their set is not named or not on this machine.

    Raises UserError.
    """
    if config.data.data is None and config.model.model not in (None, NAME):
        return None
    data = embedded(config).data
    return None if (source := _opened(data)) is None else _counted(data, source)


def pairs_of_number(count: int, data: Data, sides: int) -> Pairs:
    """A set of so many pairs, or images, which nobody has looked at: each counts as of a caption of its own. Raises UserError."""
    count = count if data.max_pairs is None else min(count, data.max_pairs)
    if data.validation_fraction is not None:  # a run's own count is near it, and depends on the captions
        return Pairs(count, max(1, count - round(data.validation_fraction * count)))
    none_a_tie = np.ones(count, np.float32)
    source = Numbered(
        swap=np.zeros(count, bool), prob=none_a_tie, smoothing=0.0, summary={}, fingerprint="", sides=sides
    )
    return _counted(data, source)


def _counted(data: Data, source: Source) -> Pairs:
    trained, _ = held_out.split(held_out.decide(data, source), source)
    return Pairs(len(source), len(trained))


def planner(train_step: TrainStep, processes: int = 1) -> Dry:
    """A function that decides a config and runs its step dry; the same config is run once. It raises UserError."""
    sides = functools.cache(_sides)

    @functools.cache
    def run(config: Config) -> tuple[Config, Taken]:
        model = sketch(config.model)
        device = "cpu" if config.runtime.device == "cpu" else "cuda"
        decided, schedule, _ = decide(config, model, DeviceFacts(device))
        decided = dealt(decided, processes)
        encoded = decided.data.data_format == "store"
        single = METHODS[decided.method.method].images == "single"
        taken = dry_step(
            decided, model, schedule, train_step, encoded=encoded, processes=processes,
            sides=sides(config.data) if single else 2,
        )  # fmt: skip
        return decided, taken

    return run


@contextmanager
def quietly() -> Iterator[None]:
    """Inside the block the trainer's own lines are not logged, warnings alone: they are on a run that trains."""
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _sides(data: Data) -> int:
    """Images of a pair: those of a set that is here, which is opened; of one that is not made yet two, the larger plan."""
    source = _opened(data)
    return 2 if source is None else source.sides


def _opened(data: Data) -> Source | None:
    """The set that `data` names; None where it is not on this machine."""
    place = Path(data.data or "").expanduser()
    if not (data.data and place.exists()):
        return None
    if data.data_format == "store" and not is_store(place):
        data = replace(data, data_format="auto")  # what a store is to be made of
    return open_source(data)


def plan(config: Config, asked: Asked, dry: Dry, pairs: Pairs | None = None) -> Plan:
    """The plan of a run; pairs: of the data set, where they are known and none were asked about. Raises UserError."""
    decided, taken = dry(config)
    pairs = pairs_of_number(asked.pairs, decided.data, taken.sides) if asked.pairs else pairs
    flops = {told: taken.flops[name] for name, told in FLOPS.items() if taken.flops.get(name)}
    open_ended = decided.optim.steps is None and pairs is None
    steps = None if open_ended else total_steps(decided, pairs.trained if pairs else 0)
    seen = None if steps is None else steps * decided.optim.pairs
    return Plan(
        config=decided,
        taken=taken,
        memory=memory(decided, taken),
        flops=flops,
        nominal=decided.optim.pairs,
        pairs=pairs,
        steps=steps,
        encoded=None
        if seen is None or pairs is None
        else cost.encoded_anew(decided, seen, pairs.trained, asked.processes, taken.sides),
        speed=speed(asked, flops),
        disk=disk(decided, taken, asked, None if pairs is None else pairs.all),
    )


def memory(config: Config, taken: Taken) -> dict[str, int]:
    """Bytes at the peak of an update, by part; on a GPU with what no tensor shows."""
    parts = {name: taken.parts.get(name, 0) for name in PARTS}
    parts[TEMPORARY] = taken.peak - sum(parts.values())
    parts[GATHERED] = taken.gathered
    if config.runtime.device != "cpu":
        parts |= cuda.unseen(sum(parts.values()))
    return {name: value for name, value in parts.items() if value}


def fits(plan: Plan, card: float) -> bool:
    """Whether the peak fits a card of so many GB."""
    return plan.peak <= cuda.room(card)


def speed(asked: Asked, flops: Mapping[str, float]) -> Speed | None:
    """Pairs per second over all processes, measured by another run or at the stated share of the GPU's peak.

    flops: of a pair, by part.
    """
    if asked.measured is not None:
        return measured(Path(asked.measured).expanduser())
    if asked.gpu is None:
        return None
    peak = peak_of(asked.gpu)
    many = f"{asked.processes} x " if asked.processes > 1 else ""
    told = f"at {asked.mfu:.0%} of the peak of {many}{asked.gpu} ({peak:g} TFLOP/s in bf16)"
    reached, pair = asked.mfu * peak * 1e12 * asked.processes, sum(flops.values())
    kept = pair - sum(flops.get(part, 0.0) for part in ENCODING)
    return Speed(reached / pair, f"{told}, not measured", reached / kept)


def measured(folder: Path) -> Speed:
    """The median of a run's own figures, without its first updates, which warm up."""
    found = [
        record["pairs_per_s"]
        for record in read_records(folder / METRICS_FILE)
        if isinstance(record.get("pairs_per_s"), int | float)
    ]
    if not found:
        raise UserError(
            f"--measured {folder}: no run with pairs/s is there; name the --output of a run that has made updates"
        )
    usual = statistics.median(found[len(found) // 4 :])
    return Speed(usual, f"as measured in {folder}", usual)


def disk(config: Config, taken: Taken, asked: Asked, pairs: int | None) -> dict[str, float]:
    """Bytes on disk, by what is written. Of the data set's own for each pair where their number is not known."""
    things = "pairs" if taken.sides == 2 else "images"
    count, of = (1, f"each {things[:-1]}") if pairs is None else (pairs, number_of(pairs, things, ","))
    checkpoint = taken.trained_bytes + taken.state_bytes + taken.averaged_bytes
    kept, best = config.output.checkpoints_limit, config.output.keep_best
    limited = f"checkpoints, {kept} kept" + (" and the best" if best else "")
    return {
        f"store of {of}, at most (no image or caption twice)": count * taken.stored_bytes,
        f"recorded reference of {of}, {asked.draws} draws": count * asked.draws * 2 * 4,
        limited if kept else "each checkpoint (all are kept)": (kept + best if kept else 1) * checkpoint,
        "result": taken.model_bytes,
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, in bytes, FLOPs and seconds."""
    return {
        "parameters": plan.taken.total,
        "trained": plan.taken.trained,
        "checkpointing": plan.config.runtime.checkpointing,
        "memory": plan.memory,
        "peak": plan.peak,
        "flops_per_pair": plan.flops,
        "pairs_per_update": plan.nominal,
        "training_pairs": plan.pairs and plan.pairs.trained,
        "updates": plan.steps,
        "epochs": plan.epochs,
        "pairs_per_s": plan.speed and plan.speed.pairs_per_s,
        "pairs_encoded": plan.encoded,
        "seconds_per_update": plan.seconds,
        "seconds": plan.total,
        "disk": plan.disk,
        "warnings": plan.warnings,
        "fits": {str(card): fits(plan, card) for card in cuda.CARDS} if plan.gpu else {},
    }

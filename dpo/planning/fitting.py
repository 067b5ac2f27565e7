"""The largest micro-batch that fits a card, and the cheapest changes that make a run fit: each one tried by a plan."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo.planning.asked import Asked
from dpo.planning.cuda import GIB
from dpo.planning.work import Dry, Plan, plan
from dpo.settings.config import Config, change

RELEASING = ("adamw8bit", "adamw")  # optimizers that --gradient-release goes with
FIRST = 8  # pairs, the second size that is tried; below 4 the VAE's calls of 8 images are not full
TRIES = 4
UNBOUNDED = 4096  # pairs


@dataclass(frozen=True)
class Change:
    """A change of settings that takes less memory, and what it costs."""

    flags: str
    cost: str
    values: Callable[[Config], dict[str, Any]]  # from the decided settings; empty where it changes nothing


def _smallest(config: Config) -> dict[str, Any]:
    size, passes = config.optim.batch_size, config.optim.accumulation
    if size == 1 or config.optim.gradient_release or _centred(config):
        return {}
    return {"batch_size": 1, "accumulation": size * passes, "effective_batch": None}


def _unless(now: bool, **values: Any) -> dict[str, Any]:
    return {} if now else values


RELEASE = Change(
    "--gradient-release --accumulation 1",
    "an update of one micro-batch alone: another training (docs/scaling.md)",
    lambda c: _unless(
        c.optim.gradient_release
        or c.lora.lora
        or c.data.buckets
        or _whole_pass(c)
        or c.runtime.precision == "fp16"
        or c.optim.optimizer not in RELEASING,
        gradient_release=True,
        accumulation=1,
        effective_batch=None,
    ),
)
FEWER = Change(
    "--batch-size 1",
    "an update of one pair, with --gradient-release: another training (docs/scaling.md)",
    lambda c: _unless(not c.optim.gradient_release or c.optim.batch_size == 1, batch_size=1, effective_batch=None),
)
CHANGES = (  # the cheapest first
    Change("--offload on", "the same result, a little slower", lambda c: _unless(_encoders_away(c), offload="on")),
    Change("--batch-size 1, and as much more --accumulation", "the same result, slower", _smallest),
    Change(
        "--vae-batch 1",
        "the same result, a little slower",
        lambda c: _unless(c.runtime.vae_batch == 1 or _stored(c), vae_batch=1),
    ),
    Change(
        "--checkpointing on",
        "the same result, a forward more for each backward",
        lambda c: _unless(c.runtime.checkpointing == "on", checkpointing="on"),
    ),
    Change(
        "a prepared store (python -m dpo.prepare), as --data STORE",
        "disk; faster",
        lambda c: _unless(_stored(c), data_format="store", offload="on"),
    ),
    Change(
        "--reference recorded (python -m dpo.prepare --reference)",
        "disk, and as many draws of noise as are recorded; faster",
        lambda c: _unless(not _stored(c) or c.runtime.reference != "copy", reference="recorded"),
    ),
    Change(
        "--precision bf16-pure --optimizer adamw8bit",
        "weights in bf16, rounded stochastically",
        lambda c: _unless(c.runtime.precision == "bf16-pure", precision="bf16-pure", optimizer="adamw8bit"),
    ),
    Change(
        "--activation-offload",
        "the same result; copies to host memory",
        lambda c: _unless(c.runtime.activation_offload or c.runtime.compile or _whole_pass(c), activation_offload=True),
    ),
    RELEASE,
    FEWER,
    Change(
        "--lora",
        "adapters in the place of all weights",
        lambda c: _unless(
            c.lora.lora,
            lora=True,
            sharding="off",
            gradient_release=False,
            reference="recorded" if c.runtime.reference == "recorded" else "auto",
        ),
    ),
)


def largest(config: Config, asked: Asked, dry: Dry, room: float, tell: Callable[[str], None]) -> Plan | None:
    """The plan with the largest micro-batch that fits `room` bytes and divides the update; None where the smallest does not fit.

    The memory of a pair follows from two sizes; the answer is a plan of its own that fits. Where the peak does not grow
    in proportion, a little more might fit too. tell: hears of each plan that is tried.
    """
    sizes = _sizes(config)
    before = best = _sized(config, asked, dry, sizes[0], tell)
    if best.peak > room:
        return None
    size = _at_most(FIRST, sizes)
    for _ in range(TRIES):
        if size == before.config.optim.batch_size:
            break
        found = _sized(config, asked, dry, size, tell)
        if found.peak <= room and size > best.config.optim.batch_size:
            best = found
        grown, pairs = found.peak - before.peak, size - before.config.optim.batch_size
        if grown / pairs <= 0:
            break
        then = int(size + (room - found.peak) / (grown / pairs))
        before, size = found, _at_most(then, sizes)
    return best


def _sized(config: Config, asked: Asked, dry: Dry, size: int, tell: Callable[[str], None]) -> Plan:
    """The plan with a micro-batch of `size` pairs, one of `_sizes`, and as many passes as make the same update."""
    passes = 1 if config.optim.gradient_release else config.optim.batch_size * config.optim.accumulation // size
    found = plan(change(config, batch_size=size, accumulation=passes, effective_batch=None), asked, dry)
    tell(f"tried --batch-size {size}: {found.peak / GIB:.1f} GiB")
    return found


def _sizes(config: Config) -> Sequence[int]:
    """Pairs that a micro-batch of the decided `config` may have, ascending.

    They divide what one process has of an update, so that it stays as it is. Where each pass is an update, any number.
    """
    optim = config.optim
    if optim.gradient_release:
        return range(1, UNBOUNDED + 1)
    if _centred(config):
        return [optim.batch_size]
    pairs = optim.batch_size * optim.accumulation
    return [size for size in range(1, pairs + 1) if pairs % size == 0]


def _at_most(size: int, sizes: Sequence[int]) -> int:
    """The largest of `sizes` that is at most `size`; the smallest where none is."""
    return sizes[max(0, bisect_right(sizes, size) - 1)]


def _centred(config: Config) -> bool:
    """Whether the loss depends on which pairs a micro-batch has."""
    return config.method.method == "kto" and config.method.kto_center == "batch"


def _encoders_away(config: Config) -> bool:
    return config.runtime.offload == "on" or _stored(config)


def _whole_pass(config: Config) -> bool:
    """Whether shards or a CUDA graph rule out what works inside the backward pass."""
    return config.runtime.sharding == "on" or config.runtime.cuda_graph


def _stored(config: Config) -> bool:
    return config.data.data_format == "store"


@dataclass(frozen=True)
class Fitted:
    """Changes that together make a run fit, and the plan with them."""

    changes: tuple[Change, ...]
    plan: Plan


def cheapest(config: Config, asked: Asked, dry: Dry, room: float, tell: Callable[[str], None]) -> Fitted | None:
    """The first of CHANGES that together make the decided `config` fit `room` bytes, without those that are not needed.

    None where all of them are not enough. tell: hears of each plan that is tried.
    """
    changes = [one for one in CHANGES if one is not RELEASE or asked.processes == 1]
    low, high = 0, len(changes)  # the least number of them that fits is in (low, high]
    found = _with(config, changes, asked, dry)
    tell(_said(found))
    if found.plan.peak > room:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        tried = _with(config, changes[:middle], asked, dry)
        tell(_said(tried))
        if tried.plan.peak <= room:
            high, found = middle, tried
        else:
            low = middle
    for one in found.changes[-2::-1]:  # the dearest first
        fewer = _with(config, [other for other in found.changes if other is not one], asked, dry)
        tell(_said(fewer))
        if fewer.plan.peak <= room:
            found = fewer
    return found


def _with(config: Config, changes: Sequence[Change], asked: Asked, dry: Dry) -> Fitted:
    """The plan with these changes, of which those are left out that change nothing."""
    made = []
    for one in changes:
        if values := one.values(config):
            made.append(one)
            config = change(config, **values)
    return Fitted(tuple(made), plan(config, asked, dry))


def _said(fitted: Fitted) -> str:
    flags = "; ".join(one.flags for one in fitted.changes) or "as it is"
    return f"tried {flags}: {fitted.plan.peak / GIB:.1f} GiB"

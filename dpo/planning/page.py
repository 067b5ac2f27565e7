"""A plan in words: what the command prints."""

from __future__ import annotations

from collections.abc import Sequence

from dpo.common.console import duration
from dpo.common.words import counted, number_of
from dpo.planning.asked import Asked
from dpo.planning.cuda import CARDS, GIB
from dpo.planning.fitting import Fitted
from dpo.planning.work import Plan, fits
from dpo.settings.config import Config

WIDTH = 13


def page(plan: Plan, asked: Asked, told: Sequence[str] = ()) -> list[str]:
    """The lines on a plan; told: more words on its memory."""
    config, taken = plan.config, plan.taken
    processes = f" x {asked.processes} processes" if asked.processes > 1 else ""
    optim = config.optim
    trained = "LoRA" if config.lora.lora else "all weights"
    one = plan.things.removesuffix("s")
    update = f"{number_of(optim.batch_size, plan.things, ',')} x {counted(optim.accumulation, 'pass', 'passes', ',')}{processes}"
    pixels = f"{config.data.resolution} pixels" + (
        " (counted for the square: buckets need no more)" if config.data.buckets else ""
    )
    where = "on a GPU (not measured)" if plan.gpu else "on the CPU"
    rows = [
        ("run", f"{config.model.model}, method {config.method.method}"),
        ("", f"{trained}, {config.runtime.precision}, {optim.optimizer}, {pixels}"),
        ("", f"{update} = {number_of(plan.nominal, plan.things, ',')} an update"),
        ("length", _length(plan)),
        ("parameters", f"{taken.total:,} in the denoiser, {taken.trained:,} trained"),
        ("FLOPs", f"{_flops(plan.pair_flops)} a{'n' * (one == 'image')} {one}"),
        *(("", f"  {name:<38}{_flops(value):>12}") for name, value in plan.flops.items()),
        ("memory", f"{plan.peak / GIB:.2f} GiB at the peak of an update, {where}"),
        *(("", f"  {name:<38}{value / GIB:>8.2f} GiB") for name, value in plan.memory.items()),
    ]  # fmt: skip
    rows += [("", f"  {said}") for said in (*told, *_of_memory(config, asked.processes))]
    if plan.gpu:
        rows.append(("fits", ", ".join(f"{card} GB {'yes' if fits(plan, card) else 'no'}" for card in CARDS)))
    rows.append(("time", _time(plan, asked)))
    rows.append(("disk", ""))
    rows += [("", f"  {name}: {_bytes(value)}") for name, value in plan.disk.items()]
    return [_row(name, text) for name, text in rows]


def _of_memory(config: Config, processes: int) -> list[str]:
    """What the figures of memory leave out, or count in a way of its own."""
    sharded = config.runtime.sharding == "on"
    said = [
        (sharded and processes == 1, "--sharding on has no effect on one process: give --processes"),
        (
            sharded and processes > 1,
            f"of each of {processes} processes, which hold the weights in shards; not measured",
        ),
        (config.runtime.cuda_graph, "--cuda-graph is not counted: its pool of memory comes on top"),
        (config.runtime.compile, "--compile is not counted: compiled blocks may take more or less"),
    ]
    return [text for holds, text in said if holds]


def _length(plan: Plan) -> str:
    """How long the run is, in updates and epochs, as far as that is known."""
    if plan.steps is None:
        return f"{plan.config.optim.epochs:g} epochs; give --pairs for the number of updates"
    updates = number_of(plan.steps, "updates", ",")
    if plan.pairs is None or plan.epochs is None:
        here = "" if plan.config.data.data is None else f"{plan.config.data.data} is not on this machine: "
        return f"{updates}; {here}give --pairs for the number of epochs"
    held = plan.pairs.all - plan.pairs.trained
    text = f"{updates} = {_epochs(plan.epochs)} of {number_of(plan.pairs.trained, plan.things, ',')}"
    return text + (f", and {held:,} are held out" if held else "")


def _epochs(value: float) -> str:
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} {'epoch' if shown == '1' else 'epochs'}"


def largest_line(found: Plan | None, planned: Plan, card: float, *, auto: bool = False) -> str:
    """The line on the largest micro-batch for a card of so many GB; auto: with all blocks computed again, if need be.

    planned: the run as it was asked for.
    """
    if found is None:
        return _row("largest", f"no micro-batch of this update fits {card:g} GB")
    optim = found.config.optim
    flags = f"--batch-size {optim.batch_size} --accumulation {optim.accumulation}"
    again = ", all blocks computed again" if auto else ""
    update = f"the same {number_of(found.nominal, found.things, ',')} an update"
    if found.nominal != planned.nominal:  # with --gradient-release, where each pass is an update
        update = f"another training: {found.nominal:,} {found.things} an update, not {planned.nominal:,}"
    return _row("largest", f"micro-batch for {card:g} GB: {flags} ({found.peak / GIB:.2f} GiB{again}; {update})")


def cheapest_lines(found: Fitted | None, card: float) -> list[str]:
    """The lines on what makes it fit a card of so many GB."""
    if found is None:
        return [_row("to fit", f"no change that is known here makes it fit {card:g} GB")]
    told = f"{card:g} GB, the cheapest change ({found.plan.peak / GIB:.2f} GiB):"
    return [_row("to fit", told), *(_row("", f"  {one.flags}: {one.cost}") for one in found.changes)]


def _row(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}".rstrip()


def _flops(value: float) -> str:
    scale, unit = next((s, u) for s, u in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (0, "FLOP")) if value >= s)
    return f"{value / (scale or 1):.2f} {unit}"


def _bytes(value: float) -> str:
    scale, unit = next(
        (s, u) for s, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes")) if value >= s
    )
    return f"{value / (scale or 1):.1f} {unit}" if scale else f"{value:.0f} {unit}"


def _time(plan: Plan, asked: Asked) -> str:
    if plan.speed is None or plan.seconds is None:
        return "name the --gpu, or a run that was --measured, for hours"
    text = f"{plan.speed.told}: {plan.speed.pairs_per_s:.3g} pairs/s, {_seconds(plan.seconds)} an update"
    if plan.steps is None or plan.total is None:
        return f"{text}; give --pairs for the number of updates"
    seen = plan.steps * plan.nominal
    kept = plan.encoded is not None and plan.encoded < seen
    encoded = f", {plan.encoded:,} of them encoded where memory keeps the set" if kept else ""
    hours = plan.total / 3600
    take = "updates ({}) take" if plan.steps > 1 else "update ({}) takes"
    text += f"; {plan.steps:,} {take.format(number_of(seen, plan.things, ',') + encoded)} {_hours(hours)}"
    if asked.price is None:
        return text
    return f"{text} and cost {hours * asked.price * asked.processes:,.2f} at {asked.price:g} an hour"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 120 else duration(value)


def _hours(value: float) -> str:
    return f"{value:,.1f} hours" if value >= 1 else _seconds(3600 * value)

"""Train every combination of some settings, and compare them in one table and one plot.

    python -m dpo.sweep --out SWEEP --beta 1000,2000,5000 --method dpo,dde --model MODEL --data STORE --reference recorded ...

A flag with values between commas is an axis of the grid; every other flag is dpo.train's and holds for all runs. Axes can be
the settings of the method, the optimizer and LoRA, the seed, the precision and the labels; a prepared store with
recorded reference errors serves all of them but other seeds and precisions. Each run has a folder of its own below SWEEP.
The same command again skips finished runs and goes on with the one that was interrupted.
"""

from __future__ import annotations

import csv
import gc
import io
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.config import specs
from dpo.errors import UserError

GROUPS = ("method", "optim", "lora")
AXES = ("seed", "precision", "caption_dropout", "label_smoothing")
FIGURES = {  # column of the table -> figure of metrics.jsonl, its mean over the last fifth of the run
    "loss": "loss",
    "implicit accuracy": "implicit_accuracy",
    "margin": "margin_mean",
    "gradient factor": "gradient_factor",
    "win error vs reference": "win_error_vs_reference",
    "lose error vs reference": "lose_error_vs_reference",
    "pairs/s": "pairs_per_s",
}

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when every run finished, 1 when some failed, 2 after a mistake of the user's, 130 when interrupted."""
    try:
        out, grid, rest = read(sys.argv[1:] if argv is None else list(argv))
        from dpo import console

        console.setup()
        return sweep(out, grid, rest)
    except UserError as error:
        print(f"dpo.sweep: {error}", file=sys.stderr)  # noqa: T201
        return 2


def read(argv: Sequence[str]) -> tuple[Path, dict[str, list[str]], list[str]]:
    """(folder, values by axis, flags of every run) of a command line. Raises UserError."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(__doc__ or "")
        raise SystemExit(0)
    spellings = {name: spec for spec in specs().values() for name in (spec.name, *spec.meta["aliases"])}
    words, rest, grid, out = list(argv), [], {}, None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if key in ("out", "output", "output_dir") and name.startswith("--"):
            out = value if equals else words.pop(0) if words else None
            continue
        spec = spellings.get(key) if name.startswith("--") else None
        value = value if equals else words[0] if words else ""
        axis = spec is not None and not spec.many and (spec.group in GROUPS or spec.name in AXES)
        if spec is not None and axis and "," in value:
            if not equals:
                words.pop(0)
            values = [part.strip() for part in value.split(",")]
            if "" in values:
                raise UserError(f"{name} {value}: a value between the commas is empty")
            grid[spec.name] = list(dict.fromkeys(values))
        else:
            rest.append(word)
    if out is None:
        raise UserError("name the folder of the sweep: --out FOLDER")
    if not grid:
        from dpo.cli import read_flags

        read_flags(rest)  # a misspelt axis is the likelier mistake
        raise UserError("nothing to compare: give a flag several values, such as --beta 1000,2000,5000")
    return Path(out).expanduser(), grid, rest


def cells(grid: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination, the last axis changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def name_of(cell: dict[str, str]) -> str:
    return "_".join(f"{axis}-{value}" for axis, value in cell.items()).replace("/", "-")


def sweep(out: Path, grid: dict[str, list[str]], rest: list[str]) -> int:
    """Runs what is not finished, one after another, and writes the comparison after each."""
    from dpo.cli import parse

    runs = cells(grid)
    configs = []
    for cell in runs:  # every mistake is found before the first run starts
        flags = [word for axis, value in cell.items() for word in (specs()[axis].flag, value)]
        configs.append(parse([*rest, *flags, "--output", str(out / name_of(cell)), "--resume", "latest"]))
    _same_flags(out, rest)
    codes: list[int] = []
    for number, (cell, (config, notes)) in enumerate(zip(runs, configs, strict=True), 1):
        log.info("run %d of %d: %s", number, len(runs), name_of(cell))
        codes.append(_run(Path(config.output.output), config, notes))
        compare(out, runs)
        if codes[-1] == 130:
            log.warning("stopped; the same command goes on from here")
            return 130
    log.info("%s", "\n" + (out / "sweep.md").read_text(encoding="utf-8"))
    return 1 if any(codes) else 0


def _same_flags(out: Path, rest: list[str]) -> None:
    """Notes what holds for all runs; refuses a sweep of other flags in the same folder, whose runs would not compare."""
    from dpo.checkpoint import write_text

    note, flags = out / "flags.txt", " ".join(rest)
    if note.is_file() and (before := note.read_text(encoding="utf-8").strip()) != flags:
        raise UserError(f"{out} holds a sweep with other flags ({before}): give the same ones, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(note, flags + "\n")


def _run(folder: Path, config: Any, notes: list[str]) -> int:
    """One run to its end, unless it is there; a failure is noted and the sweep goes on."""
    import torch

    from dpo import loop
    from dpo.train import train_step

    if _finished(folder, config):
        log.info("finished before: %s", folder)
        return 0
    (folder / "failed.txt").unlink(missing_ok=True)
    try:
        return loop.train(config, notes, train_step)
    except UserError as error:
        log.error("%s: %s", folder.name, error)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.txt").write_text(f"{error}\n", encoding="utf-8")
        return 1
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _finished(folder: Path, config: Any) -> bool:
    """Whether the run in `folder` ended well after at least the updates that are wanted now."""
    from dpo.run_record import read_run

    if not (folder / "summary.json").is_file():
        return False
    run = read_run(folder)
    return run.status == "finished" and run.done >= (config.optim.steps or run.wanted)


def compare(out: Path, runs: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Writes sweep.csv, sweep.md and sweep.png; the rows of the table, one a run."""
    from dpo.checkpoint import write_text

    rows = [row(out / name_of(cell), cell) for cell in runs]
    columns = list(rows[0])
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "sweep.csv", table.getvalue())
    lines = [columns, ["---"] * len(columns), *([_shown(row[name]) for name in columns] for row in rows)]
    write_text(out / "sweep.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    _plot(out, runs)
    return rows


def row(folder: Path, cell: dict[str, str]) -> dict[str, Any]:
    """One run in figures; empty where it has none."""
    from dpo.run_record import read_run

    found: dict[str, Any] = {**cell, "status": "failed" if (folder / "failed.txt").is_file() else "not started", "updates": 0}
    figures: dict[str, Any] = dict.fromkeys(
        [*FIGURES, "held-out accuracy", "held-out low", "held-out high", "win rate", "seconds"]
    )
    if (folder / "metrics.jsonl").is_file():
        run = read_run(folder)
        found |= {"status": run.status, "updates": run.done}
        figures |= {column: run.late(name) for column, name in FIGURES.items()}
        figures["seconds"] = run.summary.get("seconds")
        figures["win rate"] = run.evaluation.get("win_rate")
        if run.validations:
            last = run.validations[-1]
            figures["held-out accuracy"] = last["heldout_accuracy"]
            figures["held-out low"], figures["held-out high"] = last["heldout_interval"]
    return {**found, **figures, "folder": folder.name}


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(out: Path, runs: Sequence[dict[str, str]]) -> None:
    """Implicit and held-out accuracy of every run over its updates, and the last values side by side."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dpo.plots import STYLE
    from dpo.run_record import read_run

    read = [read_run(out / name_of(cell)) for cell in runs if (out / name_of(cell) / "metrics.jsonl").is_file()]
    if not read:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4 + 0.22 * len(read)))
        FigureCanvasAgg(figure)
        curves, held, bars = figure.subplots(1, 3)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(read)))
        for i, (run, colour) in enumerate(zip(read, colours, strict=True)):
            steps, values = run.series("implicit_accuracy")
            if len(steps):
                width = max(1, len(steps) // 20)
                mean = np.convolve(values, np.ones(width) / width, mode="valid")
                curves.plot(steps[len(steps) - len(mean) :], mean, color=colour)
            validations = run.validations
            held.plot(
                [v["step"] for v in validations], [v["heldout_accuracy"] for v in validations], color=colour, marker="o", ms=3
            )
            if validations:
                last = validations[-1]["heldout_accuracy"]
                low, high = validations[-1]["heldout_interval"]
                bars.errorbar(last, i, xerr=[[last - low], [high - last]], fmt="o", color=colour)
            elif (late := run.late("implicit_accuracy")) is not None:
                bars.plot(late, i, "s", color=colour)
        for axes, title in ((curves, "implicit accuracy"), (held, "held-out accuracy"), (bars, "at the end")):
            axes.set_title(title)
        for axes in (curves, held):
            axes.set_xlabel("updates")
            axes.axhline(0.5, color="0.6", lw=0.8)
        bars.axvline(0.5, color="0.6", lw=0.8)
        bars.set_yticks(range(len(read)), [run.folder.name.replace("_", " ") for run in read])
        bars.invert_yaxis()
        figure.tight_layout()
        figure.savefig(out / "sweep.png", dpi=120, facecolor="white")


if __name__ == "__main__":
    sys.exit(main())

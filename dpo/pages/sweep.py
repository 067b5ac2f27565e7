"""The comparison of a sweep's runs: a table of them, one over the seeds, and one plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo.common.files import write_text, write_whole
from dpo.pages import kept
from dpo.pages.figures import FIGURES, SWEEP
from dpo.pages.folder import FAILED_FILE, METRICS_FILE, read_run
from dpo.pages.plots import STYLE
from dpo.pages.single import guessing, trained_guessing

PAGES = TABLE_FILE, TEXT_FILE, PLOT_FILE = "sweep.csv", "sweep.md", "sweep.png"
HELD_OUT = FIGURES["heldout_accuracy"].words

# The columns of the table behind the settings: the figures stand between.
FIRST = ("status", "updates")
COLUMNS = (*(FIGURES[name].words for name in SWEEP), HELD_OUT, "held-out low", "held-out high", "win rate", "seconds")
LAST = "folder"

OVER_SEEDS = "Over the seeds: mean ± sample standard deviation of the n runs that are finished."


def name_of(cell: dict[str, str]) -> str:
    """The name of a run's folder below the sweep's: the run's settings."""
    return "_".join(f"{axis}-{value}" for axis, value in cell.items()).replace("/", "-")


def compare(out: Path, runs: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Writes sweep.csv, sweep.md and sweep.png; returns the rows of the table, one for each run."""
    rows = [row(out / name_of(cell), cell) for cell in runs]
    columns = list(rows[0])
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / TABLE_FILE, table.getvalue())
    text = _table(columns, ([_shown(row[name]) for name in columns] for row in rows))
    if seeds := over_seeds(runs, rows):
        text += f"\n{OVER_SEEDS}\n\n{_table(list(seeds[0]), (list(row.values()) for row in seeds))}"
    write_text(out / TEXT_FILE, text)
    _plot(out, runs)
    return rows


def folders_of(out: Path) -> list[str]:
    """The names of the runs' folders in the sweep.csv of `out`; none where there is none, or no sweep wrote it."""
    try:
        found = list(csv.DictReader((out / TABLE_FILE).read_text(encoding="utf-8").splitlines()))
    except (OSError, ValueError, csv.Error):
        return []
    names = [row[LAST] or "" for row in found if {*FIRST, LAST} <= row.keys()]
    return [name for name in names if Path(name).parts == (name,) and name != ".."]  # a folder below, whoever wrote it


def over_seeds(runs: Sequence[dict[str, str]], rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each combination of the axes but the seed: the figures of the finished runs, mean and deviation.

    rows: of the table of the runs. Empty where the seed is no axis.
    """
    combined: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for cell, one in zip(runs, rows, strict=True):
        if "seed" in cell:
            others = tuple((axis, value) for axis, value in cell.items() if axis != "seed")
            combined.setdefault(others, []).append(one)
    found = []
    for others, alike in combined.items():
        finished = [one for one in alike if one["status"] == "finished"]
        figures = {name: _spread([one[name] for one in finished]) for name in COLUMNS}
        found.append({**_columns(dict(others)), "n": str(len(finished)), **figures})
    return found


def _spread(values: list[float | None]) -> str:
    """Mean and sample standard deviation, in words; some runs may lack the figure."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    deviation = f"{np.std(there, ddof=1):.2g}" if len(there) > 1 else "-"
    few = f" (n = {len(there)})" if len(there) < len(values) else ""
    return f"{_shown(float(np.mean(there)))} ± {deviation}{few}"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines))


def _columns(cell: dict[str, str]) -> dict[str, str]:
    """The run's settings by column: an axis that a figure is called after, as --loss, keeps a column of its own."""
    taken = {figure.words for figure in FIGURES.values()} | {*FIRST, *COLUMNS, LAST}
    return {f"--{axis}" if axis in taken else axis: value for axis, value in cell.items()}


def row(folder: Path, cell: dict[str, str]) -> dict[str, Any]:
    """A run's settings and figures; figures that it does not have are empty."""
    found: dict[str, Any] = {
        **_columns(cell),
        "status": "failed" if (folder / FAILED_FILE).is_file() else "not started",
        "updates": 0,
    }
    figures: dict[str, Any] = dict.fromkeys(COLUMNS)
    if (folder / METRICS_FILE).is_file():
        run = read_run(folder)
        found |= {"status": run.status, "updates": run.done}
        figures |= {FIGURES[name].words: run.late(name) for name in SWEEP}
        _, seconds = run.series("seconds")  # of the updates in metrics.jsonl, whichever start made them
        figures["seconds"] = float(seconds.mean() * run.done) if len(seconds) else None
        figures["win rate"] = run.evaluation.get("win_rate")
        if (last := kept.validation(run)) is not None:
            figures[HELD_OUT] = last["heldout_accuracy"]
            figures["held-out low"], figures["held-out high"] = last["heldout_interval"]
    return {**found, **figures, LAST: folder.name}


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(out: Path, runs: Sequence[dict[str, str]]) -> None:
    """Implicit and held-out accuracy of every run over its updates, and the last values side by side."""
    read = [read_run(out / name_of(cell)) for cell in runs if (out / name_of(cell) / METRICS_FILE).is_file()]
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
                [v["step"] for v in validations],
                [v["heldout_accuracy"] for v in validations],
                color=colour,
                marker="o",
                ms=3,
            )
            if (of_result := kept.validation(run)) is not None:
                last = of_result["heldout_accuracy"]
                low, high = of_result["heldout_interval"]
                bars.errorbar(last, i, xerr=[[last - low], [high - last]], fmt="o", color=colour)
            elif (late := run.late("implicit_accuracy")) is not None:
                bars.plot(late, i, "s", color=colour)
        for axes, title in ((curves, "implicit accuracy"), (held, "held-out accuracy"), (bars, "at the end")):
            axes.set_title(title)
        for axes, level in ((curves, trained_guessing), (held, guessing)):
            axes.set_xlabel("updates")
            for value in {level(run) for run in read}:
                axes.axhline(value, color="0.6", lw=0.8)
        for value in {(guessing if kept.validation(run) else trained_guessing)(run) for run in read}:
            bars.axvline(value, color="0.6", lw=0.8)
        bars.set_yticks(range(len(read)), [run.folder.name.replace("_", " ") for run in read])
        bars.invert_yaxis()
        figure.tight_layout()
        write_whole(out / PLOT_FILE, lambda part: figure.savefig(part, format="png", dpi=120, facecolor="white"))

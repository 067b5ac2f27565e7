"""Do the methods do what the papers say? Methods x seeds on the embedded world, judged on prompts that chose no setting.

    python -m benchmarks.study --out runs/study [--seeds 5] [--rows dpo "dpo, LoRA" ...] [--processes 2]
                               [--cells benchmarks/results/study.json] [--report docs/evidence.md]

All cells train from one prepared store. A finished cell is written to the file of --cells and never run again while its flags stay
the same, so the study can be stopped, continued, and continued elsewhere; with `--seeds 0` it only writes the report. The table says
of every row how many seeds it stands on; a row without any is marked so. Names of rows have blanks: quote them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring import markdown
from dpo import checkpoint, tiny
from dpo.metrics import DECILES, share_interval
from dpo.run_record import read_run

Cell = dict[str, Any]  # what the judge said, `flags`, and for a row of TABLED the pieces of `table_history`
Cells = dict[str, dict[int, Cell]]  # row -> seed -> finished cell
SLOPE = 4.0  # of the Bradley-Terry draws that labelled the pairs
DPO = ["--method", "dpo", "--beta", "2000"]
STEP = ["--method", "dde-step", "--beta", "2000"]
SEGMENTS = [f"dpo, t in [{low}, {low + 100})" for low in range(0, 1000, 100)]
ROWS: dict[str, list[str]] = {
    "sft": ["--method", "sft", "--learning-rate", "5e-5"],
    "dpo": DPO,
    "discounted": ["--method", "discounted", "--beta", "2000"],
    "dde-single": ["--method", "dde-single", "--beta", "200"],
    "dde-step": STEP,
    "dde": ["--method", "dde", "--beta", "200"],
    "sft, t in [700, 1000)": ["--method", "sft", "--learning-rate", "3e-5", "--window-low", "700"],
    "dpo, t in [700, 1000)": [*DPO, "--window-low", "700"],
    "dpo, t in [200, 700)": [*DPO, "--window-low", "200", "--window-high", "700"],
    **{name: [*DPO, "--window-low", str(100 * i), "--window-high", str(100 * i + 100)] for i, name in enumerate(SEGMENTS)},
    "dpo, LoRA": [*DPO, "--lora", "--rank", "8", "--learning-rate", "2e-4"],
    "dde-single, LoRA": ["--method", "dde-single", "--beta", "200", "--lora", "--rank", "8", "--learning-rate", "2e-4"],
    "dpo, soft labels": DPO,
    "dde-single, soft labels": ["--method", "dde-single", "--beta", "200"],
    "dde-step, six times as long": [*STEP, "--steps", "600", "--rho", "0.5", "--scheduler", "cosine"],
}
TABLED = ("dde-step", "dde", "dde-step, six times as long")  # those with a correction table
QUARTERS = 4  # of a run: how often its table is looked at
TABLE_NOTE = """\
M is the moving average of d by timestep, C(t) its weighted sum over later timesteps; means over the seeds. 100 updates of 16 pairs
meet each of the 1000 timesteps 1.6 times, and each meeting moves M by a twentieth of d (rho = 0.95): that table has its shape, not its
size. The published runs have 2048 pairs an update, which meet each timestep twice in every update. The longer run meets each
timestep 9.6 times with rho = 0.5, and its learning rate falls to 0: there M can be held against d itself, measured over the last
quarter of the run."""


class Claim(NamedTuple):
    """What a paper says: the mean win rate of some rows is above that of others."""

    text: str
    better: list[str]
    worse: list[str]


CLAIMS = (
    Claim("Diffusion-DPO beats supervised fine-tuning", ["dpo"], ["sft"]),
    Claim("DDE's single-shot weight beats uniform credit", ["dde-single"], ["dpo"]),
    Claim("the whole of DDE beats uniform credit", ["dde"], ["dpo"]),
    Claim("the whole of DDE beats its single-shot weight alone", ["dde"], ["dde-single"]),
    Claim("stepwise estimation alone is weaker than the whole of DDE", ["dde"], ["dde-step"]),
    Claim("uniform credit beats discounted credit", ["dpo"], ["discounted"]),
    Claim("t in [200, 700) alone beats all timesteps", ["dpo, t in [200, 700)"], ["dpo"]),
    Claim("middle segments, [200, 700), beat the outer ones", SEGMENTS[2:7], SEGMENTS[:2] + SEGMENTS[7:]),
)


# ------------------------------------------------------------------------------------------------------------------- running


def soft_pairs(path: Path) -> Path:
    """The training pairs with each label replaced by the probability of the taste that drew it, read by the judge that labelled."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from dpo.tiny.judge import score

    if path.exists():
        return path
    table = pq.read_table(tiny.train_pairs_path())
    judge = tiny.load_judge("a")

    def scores(column: str) -> np.ndarray:
        images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table[column].to_pylist()]
        return score(judge.read(np.stack(images)))

    first = 1 / (1 + np.exp(-SLOPE * (scores("jpg_0") - scores("jpg_1"))))
    for name, values in (("label_0", first), ("label_1", 1 - first)):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.array(values, type=table.schema.field(index).type))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(table, part)
    os.replace(part, path)
    return path


def store_of(out: Path, row: str) -> Path:
    return out / ("store-soft" if "soft labels" in row else "store")


def prepare_stores(out: Path, rows: Iterable[str]) -> None:
    """Encode the pairs that the rows train on, once."""
    from dpo import prepare

    for store in {store_of(out, row) for row in rows}:
        pairs = soft_pairs(out / "soft.parquet") if store.name == "store-soft" else tiny.train_pairs_path()
        flags = ["--store", store, "--dtype", "fp32", "--preset", "tiny", "--model", tiny.pipeline_path(), "--data", pairs]
        if prepare.main([str(flag) for flag in flags]):
            raise SystemExit(f"{store} could not be prepared")


def folder_of(out: Path, row: str, seed: int) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in row) / f"seed-{seed}"


def finished_cell(folder: Path, row: str) -> Cell | None:
    """What the second judge said of a finished run, the flags that made it, and how its correction table came to be."""
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if summary.get("status") != "finished" or not summary.get("evaluation"):
        return None
    return summary["evaluation"] | {"flags": ROWS[row]} | (table_history(folder) if row in TABLED else {})


def table_history(folder: Path) -> dict[str, Any]:
    """M and C by tenth of the clock at the end of each quarter of the run [4, 10]; `measured` [10]: what M estimates, the mean of
    d over the last quarter, where z = -(beta/2) (d + C) tells it (`dde-step`; ties, which have no C, are not in the stores of this study).
    """
    run = read_run(folder)
    ends = [run.updates[round(len(run.updates) * (quarter + 1) / QUARTERS) - 1] for quarter in range(QUARTERS)]
    found = {name: [end[f"{name}_by_decile"] for end in ends] for name in ("table", "correction")}
    if run.method != "dde-step":
        return found
    total, pairs = np.zeros(DECILES), np.zeros(DECILES)
    for update in run.updates[-(len(run.updates) // QUARTERS) :]:
        n = np.array(update["pairs_by_decile"])
        z = np.array([margin or 0.0 for margin in update["margin_by_decile"]])  # None where there was no pair
        total += n * (-2 / run.setting("beta") * z - update["correction_by_decile"])
        pairs += n
    return found | {"measured": (total / np.maximum(pairs, 1)).tolist()}


def read_cells(path: Path) -> Cells:
    """The finished cells of the file, but for those whose row has other flags by now."""
    known: dict[str, dict[str, Cell]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {row: {int(n): cell for n, cell in known.get(row, {}).items() if cell["flags"] == ROWS[row]} for row in ROWS}


def write_cells(path: Path, cells: Cells) -> None:
    checkpoint.write_text(path, json.dumps({row: found for row, found in cells.items() if found}, indent=1) + "\n")


def run_cell(out: Path, row: str, seed: int) -> tuple[Cell | None, str]:
    """One training run, continued where it was cut off: (what came of it, a line to print)."""
    from dpo import train

    folder = folder_of(out, row, seed)
    started = any((folder / "checkpoints").glob("step-*"))
    flags = ["--preset", "tiny", *ROWS[row], "--model", tiny.pipeline_path(), "--data", store_of(out, row), "--seed", seed]
    flags += [
        "--output",
        folder,
        "--threads",
        1,
        "--validate-every",
        0,
        *(["--resume", "latest"] if started else ["--overwrite"]),
    ]
    code = train.main([str(flag) for flag in flags])
    said = "done" if code == 0 else f"ended with {code}, see {out / f'process-{os.getpid()}.log'}"
    return finished_cell(folder, row), f"{row}, seed {seed}: {said}"


def into_a_log(out: Path) -> None:
    """What a process of the pool prints goes into a file of its own."""
    log = os.open(out / f"process-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)


def run_cells(out: Path, todo: list[tuple[str, int]], processes: int) -> Iterator[tuple[str, int, Cell | None]]:
    """Each cell on one thread; a process that has drawn the unchanged model's images once keeps them for its next cells."""
    prepare_stores(out, {row for row, _ in todo})
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=into_a_log, initargs=(out,)) as pool:
        running = {pool.submit(run_cell, out, row, seed): (row, seed) for row, seed in todo}
        try:
            for done in as_completed(running):
                cell, line = done.result()
                print(line, flush=True)
                yield *running[done], cell
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise SystemExit("stopped; the same command goes on from here") from None


# ----------------------------------------------------------------------------------------------------------------- reporting


def table_of(results: Cells) -> list[dict[str, Any]]:
    """A line per row. All seeds share the prompts, so the interval is that of one set of prompts around the mean over seeds."""
    lines = []
    for row, by_seed in results.items():
        found = list(by_seed.values())
        line: dict[str, Any] = {"method": row, "seeds": len(found) or "not yet run"}
        if found:
            rates = [result["win_rate"] for result in found]
            low, high = share_interval(mean(rates) * found[0]["prompts"], found[0]["prompts"])
            line |= {
                "win rate": mean(rates),
                "over seeds": f"± {stdev(rates):.3f}" if len(rates) > 1 else None,
                "95 % interval": f"{low:.3f} to {high:.3f}",
                "lowest bound of a seed": min(result["win_rate_interval"][0] for result in found),
                "captions obeyed before": mean(result["faithfulness_before"] for result in found),
                "captions obeyed after": mean(result["faithfulness_after"] for result in found),
            }
        lines.append(line)
    return lines


def check(claim: Claim, results: Cells) -> dict[str, Any]:
    """The claim against the cells: the difference of the win rates by seed, its mean and standard error, and a verdict."""
    seeds = set.intersection(*(set(results[row]) for row in claim.better + claim.worse))

    def rate(rows: list[str], seed: int) -> float:
        return mean(results[row][seed]["win_rate"] for row in rows)

    gaps = [rate(claim.better, seed) - rate(claim.worse, seed) for seed in sorted(seeds)]
    line: dict[str, Any] = {"claim": claim.text, "seeds": len(gaps) or "not yet run"}
    if gaps:
        line |= {"difference": f"{mean(gaps):+.3f}", "larger in": f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"}
    if len(gaps) > 1:
        error = stdev(gaps) / len(gaps) ** 0.5
        line["standard error"] = f"{error:.3f}"
        line["here"] = "undecided" if abs(mean(gaps)) <= 2 * error else "holds" if mean(gaps) > 0 else "does not hold"
    return line


def correction_tables(found: dict[int, Cell]) -> dict[str, np.ndarray]:
    """`table_history` of a row, averaged over its seeds; empty without any."""
    names = [name for name in ("table", "correction", "measured") if all(name in cell for cell in found.values())]
    return {name: np.mean([cell[name] for cell in found.values()], axis=0) for name in names if found}


def write_report(path: Path, results: Cells) -> None:
    """The tables as a page, and the figure beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = table_of(results)
    columns = ["method", "seeds", "win rate", "over seeds", "95 % interval", "lowest bound of a seed"]
    columns += ["captions obeyed before", "captions obeyed after"]
    tables = {row: found for row in TABLED if (found := correction_tables(results[row]))}
    text = [
        "# Evidence from the embedded world",
        "",
        "Each row aligns the shipped pipeline with the shipped pairs (`--preset tiny`: 100 updates of 16 pairs; the flags are in",
        "`benchmarks/study.py`), then draws the report prompts with the unchanged and the aligned UNet from the same noise. The second judge,",
        "which labelled nothing, compares them. Settings were chosen on other prompts with the first judge, for `dpo` and `dde-single` only;",
        "the other rows take theirs from these, so a row that is behind may be behind for want of tuning. A win rate means little without the",
        "share of captions that are still obeyed beside it; and since a prompt is won by however little, it tells direction rather than size.",
        "Two updates at learning rate 1e-12 are judged 0.500. Made by `python -m benchmarks.study --report docs/evidence.md`.",
        "",
        markdown(lines, columns),
        "The interval is that of the prompts around the mean over seeds (all seeds share the prompts).",
        "",
        "## What the papers say, and what holds here",
        "",
        "Differences are taken seed by seed; *undecided* means within two standard errors of nothing.",
        "",
        markdown(
            [check(claim, results) for claim in CLAIMS], ["claim", "seeds", "difference", "standard error", "larger in", "here"]
        ),
    ]
    if tables:
        text += ["## The correction table of stepwise estimation", "", *describe_tables(tables)]
    if any(results.values()):
        text += ["", f"![win rates, segments, correction]({path.with_suffix('.png').name})", ""]
        plot(path.with_suffix(".png"), [line for line in lines if "win rate" in line], tables)
    path.write_text("\n".join(text), encoding="utf-8")


def describe_tables(tables: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """d, M and C by tenth of the clock at the end, and how C grew over the run."""
    columns = {
        f"{symbol}, {row}": found[name].reshape(-1, DECILES)[-1]
        for row, found in tables.items()
        for symbol, name in (("d", "measured"), ("M", "table"), ("C", "correction"))
        if name in found
    }
    head = ["tenth of t", *columns]
    lines = [
        {head[0]: f"{tenth * 10} to {tenth * 10 + 10} %"} | {name: values[tenth] for name, values in columns.items()}
        for tenth in range(DECILES)
    ]
    text = [
        TABLE_NOTE,
        "",
        markdown(lines, head),
    ]
    for row, found in tables.items():
        size = np.abs(found["correction"])
        moved = size[-1].mean() / size[-2].mean() - 1
        text.append(
            f"`{row}`: |C| falls with t from {size[-1, 0]:.3g} in the first tenth to {size[-1, -1]:.3g} in the last; "
            f"its mean after each quarter of the run is {', '.join(f'{value:.3g}' for value in size.mean(1))}, the last quarter changed it "
            f"by {moved:+.0%}."
            + (
                f" M is {found['table'][-1].mean() / found['measured'].mean():.0%} of the d it estimates."
                if "measured" in found
                else ""
            )
        )
    return text


def plot(path: Path, lines: list[dict[str, Any]], tables: dict[str, dict[str, np.ndarray]]) -> None:
    """Win rates beside faithfulness; win rate by timestep segment; C(t) as the run goes on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, segments, correction) = pyplot.subplots(1, 3, figsize=(17, 2 + 0.22 * len(lines)), layout="constrained")
    _points(rates, [line["method"] for line in lines if line["method"] not in SEGMENTS][::-1], lines)
    obeyed = {line["method"]: line["captions obeyed after"] for line in lines if line["method"] not in SEGMENTS}
    rates.plot(list(obeyed.values()), list(obeyed), "x", color="grey", label="captions obeyed after")
    rates.axvline(0.5, color="grey", linewidth=1)
    rates.set_xlabel("win rate over the unchanged model, 95 % interval")
    rates.legend(loc="lower left", fontsize="small")
    _points(segments, [name for name in SEGMENTS if any(line["method"] == name for line in lines)][::-1], lines)
    segments.axvline(0.5, color="grey", linewidth=1)
    segments.set_xlabel("win rate of dpo on a tenth of the timesteps")
    if tables:
        row = next(reversed(tables))  # the longest
        for quarter, found in enumerate(tables[row]["correction"], start=1):
            correction.plot(np.arange(DECILES) * 100 + 50, found, marker="o", label=f"after {quarter} of {QUARTERS} quarters")
        correction.set_xlabel("t")
        correction.set_ylabel(f"C(t) of {row}")
        correction.axhline(0, color="grey", linewidth=1)
        correction.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(axes: Any, names: list[str], lines: list[dict[str, Any]]) -> None:
    by_name = {line["method"]: line for line in lines}
    shown = [by_name[name]["win rate"] for name in names]
    ends = np.array([[float(end) for end in by_name[name]["95 % interval"].split(" to ")] for name in names]).reshape(-1, 2)
    axes.errorbar(shown, names, xerr=np.abs(ends.T - np.array(shown)), fmt="o", capsize=3, label="win rate")


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the cells")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default: 5)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="cells at a time, one thread each")
    parser.add_argument("--report", type=Path, help="page to write, for example docs/evidence.md")
    parser.add_argument("--cells", type=Path, help="file of the finished cells, read and added to (default: OUT/cells.json)")
    given = parser.parse_args(None if argv is None else list(argv))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.cells or given.out / "cells.json"
    cells = read_cells(path)
    if todo := [(row, seed) for seed in range(given.seeds) for row in given.rows if seed not in cells[row]]:
        for row, seed, cell in run_cells(given.out, todo, given.processes):
            if cell:
                cells[row][seed] = cell
                write_cells(path, cells)
    print(markdown(table_of(cells), ["method", "seeds", "win rate", "95 % interval", "captions obeyed after"]))
    if given.report:
        write_report(given.report, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())

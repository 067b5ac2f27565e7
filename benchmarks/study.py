"""Do the methods do what the papers say? Methods x seeds on the embedded world, judged on prompts that chose no setting.

    python -m benchmarks.study --out runs/study [--seeds 5] [--rows dpo dde-single ...] [--processes 2] [--report docs/evidence.md]

A finished cell is never run again, so the study can be stopped and continued. The table says of every row how many seeds it
stands on; a row without any is marked so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.measuring import markdown
from dpo import tiny
from dpo.metrics import share_interval

SLOPE = 4.0  # of the Bradley-Terry draws that labelled the pairs
DPO = ["--method", "dpo", "--beta", "2000"]
ROWS: dict[str, list[str]] = {
    "sft": ["--method", "sft", "--learning-rate", "5e-5"],
    "dpo": DPO,
    "discounted": ["--method", "discounted", "--beta", "2000"],
    "dde-single": ["--method", "dde-single", "--beta", "200"],
    "dde-step": ["--method", "dde-step", "--beta", "2000"],
    "dde": ["--method", "dde", "--beta", "200"],
    "dpo, t in [200, 700)": [*DPO, "--window-low", "200", "--window-high", "700"],
    **{
        f"dpo, t in [{low}, {low + 100})": [*DPO, "--window-low", str(low), "--window-high", str(low + 100)]
        for low in range(0, 1000, 100)
    },
    "dpo, LoRA": [*DPO, "--lora", "--rank", "8", "--learning-rate", "2e-4"],
    "dde-single, LoRA": ["--method", "dde-single", "--beta", "200", "--lora", "--rank", "8", "--learning-rate", "2e-4"],
    "dpo, soft labels": DPO,
    "dde-single, soft labels": ["--method", "dde-single", "--beta", "200"],
}
MAIN = ("sft", "dpo", "discounted", "dde-single", "dde-step", "dde")


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


def folder_of(out: Path, row: str, seed: int) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in row) / f"seed-{seed}"


def outcome(folder: Path) -> dict[str, Any] | None:
    """What the second judge said of a finished cell."""
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return summary["evaluation"] if summary.get("status") == "finished" and summary.get("evaluation") else None


def run_cell(out: Path, row: str, seed: int) -> str:
    """One training run in a process of its own, on one thread; continued where it was cut off."""
    folder = folder_of(out, row, seed)
    if outcome(folder):
        return f"{row}, seed {seed}: done before"
    started = any((folder / "checkpoints").glob("step-*"))
    flags = [
        "--preset",
        "tiny",
        *ROWS[row],
        "--seed",
        str(seed),
        "--output",
        str(folder),
        "--threads",
        "1",
        "--validate-every",
        "0",
    ]
    if "soft labels" in row:
        flags += ["--data", str(soft_pairs(out / "soft.parquet")), "--model", str(tiny.pipeline_path())]
    flags += ["--resume", "latest"] if started else ["--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-m", "dpo.train", *flags], env=environment, capture_output=True, text=True)
    return f"{row}, seed {seed}: " + ("done" if found.returncode == 0 else found.stderr.strip().splitlines()[-1])


def table_of(out: Path, seeds: int) -> list[dict[str, Any]]:
    """A line per row: win rate over the base with the spread over seeds and a pooled 95 % interval, faithfulness beside it."""
    lines = []
    for row in ROWS:
        found = [result for seed in range(seeds) if (result := outcome(folder_of(out, row, seed)))]
        line: dict[str, Any] = {"method": row, "seeds": len(found) or "not yet run"}
        if found:
            rates = [result["win_rate"] for result in found]
            prompts = sum(result["prompts"] for result in found)
            low, high = share_interval(sum(r["win_rate"] * r["prompts"] for r in found), prompts)
            line |= {
                "win rate": mean(rates),
                "over seeds": f"± {stdev(rates):.3f}" if len(rates) > 1 else None,
                "95 % interval": f"{low:.3f} to {high:.3f}",
                "captions obeyed before": mean(result["faithfulness_before"] for result in found),
                "captions obeyed after": mean(result["faithfulness_after"] for result in found),
            }
        lines.append(line)
    return lines


def write_report(path: Path, lines: list[dict[str, Any]]) -> None:
    """The table as a page, and the figure beside it."""
    columns = ["method", "seeds", "win rate", "over seeds", "95 % interval", "captions obeyed before", "captions obeyed after"]
    done = [line for line in lines if "win rate" in line]
    text = [
        "# Evidence from the embedded world",
        "",
        "Each row aligns the shipped pipeline with the shipped pairs (`--preset tiny`, the flags in `benchmarks/study.py`), then draws the",
        "report prompts with the unchanged and the aligned UNet from the same noise. The second judge, which labelled nothing, compares them.",
        "A win rate means little without the share of captions that are still obeyed beside it. Made by `python -m benchmarks.study`.",
        "",
        markdown(lines, columns),
    ]
    if done:
        text += ["", f"![win rates]({path.with_suffix('.png').name})", ""]
        plot(path.with_suffix(".png"), done)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text), encoding="utf-8")


def plot(path: Path, lines: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, rates = [line["method"] for line in lines][::-1], [line["win rate"] for line in lines][::-1]
    ends = [tuple(map(float, line["95 % interval"].split(" to "))) for line in lines][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(lines)), layout="constrained")
    errors = np.abs(np.array(ends).T - np.array(rates))
    axes.errorbar(rates, names, xerr=errors, fmt="o", capsize=3)
    axes.axvline(0.5, color="grey", linewidth=1)
    axes.set_xlabel("win rate over the unchanged model, 95 % interval")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the cells")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default: 5)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of: {'; '.join(ROWS)}")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="cells at a time, one thread each")
    parser.add_argument("--report", type=Path, help="page to write, for example docs/evidence.md")
    given = parser.parse_args(None if argv is None else list(argv))
    cells = [(row, seed) for seed in range(given.seeds) for row in given.rows]
    with ThreadPoolExecutor(given.processes) as pool:
        for line in pool.map(lambda cell: run_cell(given.out, *cell), cells):
            print(line, flush=True)
    lines = table_of(given.out, given.seeds)
    print(markdown(lines, ["method", "seeds", "win rate", "95 % interval", "captions obeyed after"]))
    if given.report:
        write_report(given.report, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything a GPU has to show, in one call, without a network.

    python -m benchmarks.gpu --out DIR [--section parity kernels steps] [--minutes 9] [--smoke]

Parity of every kernel with float64 and exact zeros at step 0, then each kernel beside eager torch and torch.compile,
then whole training steps. Results are written as they come: results.json, one CSV a section, tables.md and two plots.
`--smoke` runs tiny shapes, on a CPU too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops, parity, steps
from benchmarks.measuring import Results, about, copy_bandwidth, markdown

SHARES = {"parity": 0.1, "kernels": 0.35, "steps": 0.55}
COLUMNS = {
    "parity": ["op", "dtype", "kernel", "plain", "ok"],
    "kernels": [
        "op",
        "model",
        "shape",
        "direction",
        "fused_us",
        "eager_us",
        "compiled_us",
        "GB/s",
        "of copy",
        "x eager",
        "x compiled",
        "failed",
    ],
    "steps": [
        "model",
        "setting",
        "pairs",
        "ms per micro-step",
        "pairs/s",
        "x peers",
        "TFLOP/s",
        "MFU",
        "GiB",
        "failed",
    ],
}


def parity_rows(device: torch.device, smoke: bool, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from parity.rows(device, smoke)


def kernel_rows(device: torch.device, smoke: bool, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    bandwidth = copy_bandwidth(device)
    header["copy GB/s"] = bandwidth / 1e9
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in ops.cases(device, dtype, smoke):
        yield ops.measure(case, device, bandwidth, 0.01 if smoke else 0.1)


def step_rows(device: torch.device, smoke: bool, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for model in (steps.small_model(),) if smoke else (steps.SDXL, steps.SD15):
        yield from steps.rows(model, device, 0.01 if smoke else 1.0)


SECTIONS: dict[str, Callable[[torch.device, bool, dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "parity": parity_rows,
    "kernels": kernel_rows,
    "steps": step_rows,
}


def run(out: Path, chosen: list[str], minutes: float, smoke: bool) -> bool:
    """All chosen sections, each within its share of the time. True when every parity check passed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = about(device)
    results = Results(out, header)
    total = sum(SHARES[name] for name in chosen)
    for name in chosen:
        end = time.monotonic() + 60 * minutes * SHARES[name] / total
        for row in SECTIONS[name](device, smoke, header):
            results.add(name, row)
            print(
                name,
                " ".join(f"{key}={row[key]:.4g}" if isinstance(row[key], float) else f"{row[key]}" for key in row),
                flush=True,
            )
            if time.monotonic() > end:
                results.add(name, {COLUMNS[name][0]: "stopped: this section's share of the time is used up"})
                break
    results.write("tables.md", tables(results))
    plot(results)
    return all(row.get("ok", True) for row in results.rows.get("parity", []))


def tables(results: Results) -> str:
    """All sections as Markdown, under what they were measured on."""
    lines = ["# GPU benchmark", "", ", ".join(f"{key} {value}" for key, value in results.header.items()), ""]
    for name, rows in results.rows.items():
        lines += [f"## {name}", "", markdown(rows, COLUMNS[name])]
    return "\n".join(lines)


def plot(results: Results) -> None:
    """kernels.png: time against eager and compiled; steps.png: pairs/s up the ladder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {
        "kernels": (
            "x eager",
            lambda row: f"{row['op']} {row['model']} {row['shape']} {row['direction']}",
            "times faster than eager torch",
        ),
        "steps": ("pairs/s", lambda row: f"{row['model']}: {row['setting']}", "pairs per second"),
    }
    for name, (value, label, title) in bars.items():
        rows = [row for row in results.rows.get(name, []) if row.get(value)]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(rows)), layout="constrained")
        axes.barh([label(row) for row in rows][::-1], [row[value] for row in rows][::-1])
        axes.set_title(
            f"{title} ({results.header['device']}, torch {results.header['torch']}, {results.header['date']})",
            fontsize=9,
        )
        axes.tick_params(labelsize=7)
        figure.savefig(results.folder / f"{name}.png", dpi=110)
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when a parity check failed."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default: 9)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does everything run?")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available() and not given.smoke:
        parser.error("torch sees no GPU here; --smoke runs tiny shapes on the CPU")
    return 0 if run(given.out, given.section, given.minutes, given.smoke) else 1


if __name__ == "__main__":
    sys.exit(main())

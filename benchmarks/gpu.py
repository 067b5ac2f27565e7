"""Everything a GPU has to show, in one call, without a network.

    python -m benchmarks.gpu --out DIR [--section probe step0 parity ...] [--minutes 9] [--wheels DIR] [--smoke]

In the order of value: what the device can do; step 0 and CUDA graphs at full size; every kernel against float64; a training
run that is killed and resumed; kernels, then whole training steps beside their bounds and the peers' step; compiled steps;
steps of rectified flow.
`--section peers` gives the peers' step its full time. Each section runs in a process of its own (children.py): what raises,
hangs or is killed is a row, and the rest goes on. Results are written after each row: results.json, one CSV a section,
tables.md, and all of it as results.tar.gz; two plots at the end. `--smoke` runs tiny shapes, on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checks import said
from benchmarks.children import command_of, rows_of
from benchmarks.measuring import RESULTS, Results, markdown
from benchmarks.sections import SECTIONS
from dpo.common.files import write_whole

ARCHIVE = "results.tar.gz"
WHEELS_SECONDS = 120


def run(out: Path, chosen: list[str], minutes: float, smoke: bool, wheels: Path | None = None) -> bool:
    """All chosen sections in the time; what one leaves goes to those behind it. True when no check failed."""
    end = time.monotonic() + 60 * minutes
    results = Results(out, {"command": "python -m benchmarks.gpu --section " + " ".join(chosen)})
    with tempfile.TemporaryDirectory() as site:
        environment = dict(os.environ)
        if wheels is not None:
            add(results, "probe", unpack(wheels, Path(site)))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH", "")]))
        for index, name in enumerate(chosen):
            left = end - time.monotonic()
            share = SECTIONS[name].share / sum(SECTIONS[other].share for other in chosen[index:])
            command = command_of(name, smoke, out / RESULTS)
            for row in rows_of(command, left * share, environment, results.header.update):
                add(results, name, row)
    try:
        plot(results)
    except Exception as error:
        add(results, "plots", {"check": "plots", "failed": said(error)})
    pack(results)
    return all(row.get("ok", True) for rows in results.rows.values() for row in rows)


def add(results: Results, section: str, row: dict[str, Any]) -> None:
    """Takes a row in, prints it, and rewrites tables and archive."""
    if section in ("steps", "compiled", "peers"):
        row = beside_peers(results, row)
    results.add(section, row)
    results.write("tables.md", tables(results))
    pack(results)
    values = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
    print(section, *values, flush=True)


def beside_peers(results: Results, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its rate over that of the peers' step on all weights of the same model, where both are known."""
    everything = (row for rows in results.rows.values() for row in rows)
    rates = [known.get("pairs/s") for known in everything if is_peers(known) and known.get("model") == row.get("model")]
    if row.get("pairs/s") and rates and rates[0]:
        return row | {"x peers": row["pairs/s"] / rates[0]}
    return row


def is_peers(row: dict[str, Any]) -> bool:
    return bool(row.get("setting") == "peers: all weights")


def unpack(wheels: Path, site: Path) -> dict[str, Any]:
    """Installs the wheels of a folder into `site`, without a network and without what they need; a row with the seconds."""
    began = time.monotonic()
    row: dict[str, Any] = {"check": "wheels unpacked, seconds"}
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--find-links",
        str(wheels),
        "--no-deps",
        "--no-compile",
    ]
    try:
        subprocess.run(
            [*words, "--target", str(site), *files], check=True, capture_output=True, text=True, timeout=WHEELS_SECONDS
        )
    except subprocess.CalledProcessError as error:
        return row | {"failed": (error.stderr.strip().splitlines() or [said(error)])[-1][:300], "ok": False}
    except Exception as error:
        return row | {"failed": said(error), "ok": False}
    return row | {"value": time.monotonic() - began}


def tables(results: Results) -> str:
    """All sections as Markdown, under what they were measured on."""
    lines = ["# GPU benchmark", "", ", ".join(f"{key} {value}" for key, value in results.header.items()), ""]
    for name, rows in results.rows.items():
        known = SECTIONS.get(name)
        title, columns = (known.title, list(known.columns)) if known else (name, list(rows[0]))
        used = [column for column in columns if any(row.get(column) is not None for row in rows)]
        if "check" not in used and any("check" in row for row in rows):
            used = ["check", *used]
        lines += [f"## {title}", "", markdown(rows, used)]
    return "\n".join(lines)


def pack(results: Results) -> None:
    """All result files as one archive beside them."""

    def write(path: Path) -> None:
        with tarfile.open(path, mode="w:gz") as archive:
            for part in sorted(results.folder.iterdir()):
                if part.suffix in (".json", ".csv", ".md", ".png"):
                    archive.add(part, arcname=part.name)

    write_whole(results.folder / ARCHIVE, write)


def plot(results: Results) -> None:
    """kernels.png: time against eager; steps.png: pairs/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {
        "kernels": (
            "x eager",
            lambda row: f"{row['op']} {row['model']} {row['shape']} {row['direction']}",
            "times faster than eager torch",
        ),
        "steps": ("pairs/s", lambda row: f"{row['model']}: {row['setting']}, {row['pairs']}", "pairs per second"),
    }
    for name, (value, label, title) in bars.items():
        rows = [row for row in results.rows.get(name, []) if row.get(value)]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(rows)), layout="constrained")
        axes.barh([label(row) for row in rows][::-1], [row[value] for row in rows][::-1])
        header = results.header
        axes.set_title(
            f"{title} ({header.get('device')}, torch {header.get('torch')}, {header.get('date')})", fontsize=9
        )
        axes.tick_params(labelsize=7)
        figure.savefig(results.folder / f"{name}.png", dpi=110)
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 when a check failed."""
    default = [name for name, section in SECTIONS.items() if section.by_default]
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--section", nargs="+", choices=list(SECTIONS), default=default, help=f"default: {', '.join(default)}"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default: 9)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine's Python lacks")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does everything run?")
    given = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available() and not given.smoke:
        parser.error("torch sees no GPU here; --smoke runs tiny shapes on the CPU")
    if given.wheels is not None and not any(given.wheels.glob("*.whl")):
        parser.error(f"--wheels {given.wheels}: there are no wheels in it")
    return 0 if run(given.out, given.section, given.minutes, given.smoke, given.wheels) else 1


def _ended(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # so that children are ended too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)
    sys.exit(main())

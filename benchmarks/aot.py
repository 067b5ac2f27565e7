"""Compiles every kernel for every supported GPU, without a GPU, and tabulates what the machine code uses.

    python -m benchmarks.aot [--out FILE.csv|FILE.md] [--target sm_90 ...] [--dtype bf16 ...] [--kernel SUBSTRING]

One row per kernel, dtype and target: registers per thread, spill instructions, shared bytes per program, 16-byte global
loads and stores, instructions outside loops and in one turn of them (`--classes`: by operation). Exits with 1 when a
kernel spills on an NVIDIA target, exceeds the shared memory, adds floats atomically or lost an expected vector access.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

from benchmarks.machine_code import COLUMNS, TARGETS, Compiled, check, compile_specimen
from csrc_triton.specimen import specimens


def write_table(rows: list[Compiled], path: Path) -> None:
    """CSV, or Markdown when the name ends in .md."""
    cells = [[str(getattr(row, column)) for column in COLUMNS] for row in rows]
    if path.suffix == ".md":
        lines = ["| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *cells]]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *cells])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot", description="Compile every kernel for every target; no GPU needed."
    )
    parser.add_argument("--out", type=Path, help="write the table here: .csv or .md; rewritten after every row")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--dtype", nargs="+", help="default: all that a kernel is used in")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--classes", action="store_true", help="below each row, how often each operation is in it")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("nothing is compiled under TRITON_INTERPRET=1")
    chosen = [
        s for s in specimens() if arguments.kernel in s.name and (not arguments.dtype or s.dtype in arguments.dtype)
    ]
    rows: list[Compiled] = []
    failures = 0
    for specimen in chosen:
        for target in arguments.target:
            compiled = compile_specimen(specimen, target)
            faults = check(specimen, compiled)
            failures += bool(faults)
            rows.append(compiled)
            print(*(getattr(compiled, column) for column in COLUMNS), "; ".join(faults) or "ok", sep="\t", flush=True)
            if arguments.classes:
                for where, count in zip(("once", "per turn"), compiled.classes, strict=True):
                    print(f"    {where}:", *(f"{name} {n}" for name, n in count.most_common()))
            if arguments.out:
                write_table(rows, arguments.out)
    print(f"{len(rows)} compiled, {failures} with faults")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

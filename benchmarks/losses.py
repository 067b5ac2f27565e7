"""Do two commits train alike? The figures and the weights of the first updates, compared bit for bit.

    python -m benchmarks.losses HEAD~1                         the working tree against a commit
    python -m benchmarks.losses v0.1 main --steps 5            two commits
    python -m benchmarks.losses HEAD~1 --run "--method dde --lora --rank 4" --run "--method sft"

Each run trains the small world inside the package, in a checkout of its own, with the same interpreter and packages.
The command ends with 1 where anything differs: a move of code should change nothing, and a change of arithmetic should
be seen here before it is believed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNS = (
    "",
    "--method dde --lora --rank 4 --label-smoothing 0.1",
    "--method sft --flip",
    "--loss ipo --ties keep --sft-weight 0.1",
)
FIGURES = (
    "loss",
    "margin_mean",
    "implicit_accuracy",
    "difference_mean",
    "policy_win_error",
    "reference_win_error",
    "grad_norm",
)
QUIET = "--no-judge --validate-every 0 --workers 0 --threads 1 --no-model-card --sample-steps 1 --sample-seeds 0 --sample-prompts red"


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the files of `commit`; "." is the working tree itself."""
    if commit == ".":
        yield Path.cwd()
        return
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def train(tree: Path, flags: str, steps: int, device: str) -> dict[str, Any]:
    """The figures of each update by its number, and the checksums of the last checkpoint."""
    with tempfile.TemporaryDirectory(prefix="losses-run-") as output:
        words = shlex.split(f"{QUIET} {flags} --device {device} --steps {steps}")
        command = [sys.executable, "-m", "dpo.train", "--output", output, *words]
        subprocess.run(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, check=True, stderr=subprocess.DEVNULL
        )
        rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        updates = {f"update {row['step']}": {name: row[name] for name in FIGURES} for row in rows if "event" not in row}
        state = json.loads(next(Path(output).glob("checkpoints/*/state.json")).read_text(encoding="utf-8"))
        return updates | {"files": state["checksums"]}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, a line each."""
    lines = []
    for part in old.keys() | new.keys():
        before, after = old.get(part, {}), new.get(part, {})
        names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        lines += [f"{part}: {name} {before.get(name)} -> {after.get(name)}" for name in names]
    return sorted(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", default=".", help="another commit (default: the working tree)")
    parser.add_argument("--steps", type=int, default=3, help="updates of each run (default: 3)")
    parser.add_argument(
        "--run", action="append", metavar="FLAGS", help="flags of dpo.train; may be given several times"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args(arguments)
    wrong = 0
    with checkout(options.old) as old, checkout(options.new) as new:
        for flags in options.run or RUNS:
            found = [train(tree, flags, options.steps, options.device) for tree in (old, new)]
            lines = differences(*found)
            losses = ", ".join(f"{row['loss']:.6f}" for name, row in found[1].items() if name.startswith("update"))
            print(
                f"{flags or 'the default run'}: losses {losses}; {'differs' if lines else 'equal, bit for bit'}",
                flush=True,
            )
            for line in lines:
                print(f"    {line}")
            wrong += bool(lines)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

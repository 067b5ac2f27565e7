"""A training run in the embedded world, killed and resumed: are its weights those of a run that was not, bit for bit?

With and without --deterministic, each by the command that a user gives.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import Check

UPDATES, EVERY = 20, 5
WAYS = {"--deterministic": ["--deterministic"], "by default": []}
FLAGS = ["--batch-size", "8", "--effective-batch", "16", "--no-samples", "--no-judge", "--validate-every", "0"]


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    updates, every = (2, 1) if smoke else (UPDATES, EVERY)
    ways = dict(list(WAYS.items())[:1]) if smoke else WAYS
    flags = ["--batch-size", "2", "--effective-batch", "2"] if smoke else []
    return [
        Check(
            f"a run that is killed and resumed, {name}",
            lambda name=name, more=more: resumed(device.type, name, [*FLAGS, *flags, *more], updates, every),
            max(60.0, seconds / len(ways)),
        )
        for name, more in ways.items()
    ]


def resumed(device: str, name: str, flags: Sequence[str], updates: int, every: int) -> Iterator[dict[str, Any]]:
    """One row: seconds of two runs at once, whether a second run and a killed one have the weights of the first, and the largest difference."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        common = ["--device", device, "--steps", str(updates), "--checkpoint-every", str(every), *flags]
        row: dict[str, Any] = {"check": f"{updates} updates, {name}"}
        began = time.monotonic()
        both = [_start(root / label, common) for label in ("first", "second")]
        try:
            row["killed after update"] = _kill(root / "killed", common, updates)
            for run in both:
                _finish(run)
        finally:
            for run in both:
                run.kill()
                run.wait()
        row["seconds of two at once"] = time.monotonic() - began
        _finish(_start(root / "killed", [*common, "--resume", "latest"]))
        first = weights(root / "first")
        for label in ("second", "killed"):
            other = weights(root / label)
            pairs = [(first[key], other[key]) for key in first]
            row[f"{label}: same bits"] = first.keys() == other.keys() and all(torch.equal(a, b) for a, b in pairs)
            row[f"{label}: largest difference"] = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
        claimed = device == "cpu" or "--deterministic" in flags
        yield row | {"ok": not claimed or (row["second: same bits"] and row["killed: same bits"])}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What was trained in a run, by file and name."""
    from safetensors.torch import load_file

    files = [*(run / "unet").glob("*.safetensors"), *run.glob("*.safetensors")]
    if not files:
        raise FileNotFoundError(f"{run.name} has left no weights")
    return {f"{path.name}:{key}": value for path in files for key, value in load_file(path).items()}


def _start(output: Path, flags: Sequence[str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "dpo.train", "--output", str(output), *flags]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(run: subprocess.Popen[str]) -> None:
    """Waits for a run. Raises RuntimeError with its last line where it failed."""
    _, said = run.communicate()
    if run.returncode:
        raise RuntimeError((said.strip().splitlines() or [f"dpo.train ended with code {run.returncode}"])[-1])


def _kill(output: Path, flags: Sequence[str], updates: int) -> int:
    """Kills a run as soon as it has a checkpoint; the update of its last one. Raises RuntimeError where it ends before."""
    run = _start(output, flags)
    while run.poll() is None:
        if made := _checkpoints(output):
            run.kill()
            run.communicate()
            return max([*made, *_checkpoints(output)])
        time.sleep(0.02)
    _finish(run)
    if not (made := _checkpoints(output)):
        raise RuntimeError("the run ended without a checkpoint")
    raise RuntimeError(f"the run ended at update {max(made)} of {updates} before it could be killed")


def _checkpoints(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")]

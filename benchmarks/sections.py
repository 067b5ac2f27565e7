"""The sections of the call, in the order of their value: what is checked or measured, in what share of the time, and its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from benchmarks.checks import Check, Row


@dataclass(frozen=True)
class Section:
    """checks: FILE.FUNCTION of (device, smoke, seconds) -> list[Check], loaded in the child alone. share: seconds of 540.

    behind: a section before it whose rows the function takes as a fourth argument; none of them where that was not made.
    """

    title: str
    checks: str
    share: float
    columns: tuple[str, ...]
    by_default: bool = True
    behind: str | None = None


PASSED = ("check", "dtype", "kernel", "plain", "ok", "failed")
STEPS = (
    "model", "setting", "pairs", "ms", "ms an update", "pairs/s", "x peers", "predicted on H100", "bound by FLOPs", "bound by bytes",
    "TFLOP/s", "MFU", "MFU predicted", "outside the UNet", "GiB, estimated", "GiB", "GiB, reserved", "failed",
)  # fmt: skip
SECTIONS: dict[str, Section] = {
    "probe": Section(
        "The device", "probe.checks", 30,
        ("check", "value", "same bits with and without a gradient", "two backward passes, same bits", "forward, us", "backward, us", "failed"),
    ),
    "step0": Section(
        "Step 0 and replays, full size", "step_zero.checks", 70,
        ("check", "value", "ok", "loss before", "loss after", "failed"),
    ),
    "parity": Section("Kernels against float64", "parity.checks", 60, PASSED),
    "training": Section(
        "Killed and resumed", "train_on_device.checks", 90,
        (
            "check", "seconds of two at once", "killed after update", "second: same bits", "second: largest difference", "killed: same bits",
            "killed: largest difference", "ok", "failed",
        ),
    ),
    "kernels": Section(
        "Kernels", "ops.checks", 60,
        (
            "op", "model", "shape", "direction", "fused_us", "eager_us", "compiled_us", "host_us", "GB/s", "of copy", "x eager",
            "x compiled", "failed",
        ),
    ),
    "steps": Section("Training steps", "steps.checks", 115, STEPS),
    "profile": Section(
        "Where a step's time goes", "steps.profile_checks", 20,
        ("model", "setting", "pairs", "kernel", "calls", "ms", "share", "failed"), behind="steps",
    ),
    "compiled": Section("Compiled steps", "steps.compiled_checks", 60, STEPS),
    "flows": Section("Steps of rectified flow", "flows.checks", 35, ("check", "value", "ok", *STEPS)),
    "peers": Section("The peers' step, full time", "steps.peers_checks", 540, STEPS, by_default=False),
    "planted": Section(
        "Planted faults", "planted.checks", 60, ("check", "value", "ok", "failed"), by_default=False
    ),
}  # fmt: skip


def begin(name: str, smoke: bool, seconds: float, known: Mapping[str, list[Row]]) -> tuple[list[Check], dict[str, Any]]:
    """(the checks of a section on this machine's device, what is known of the device), in a child.

    known: the rows of the call so far, by section.
    """
    from benchmarks.measuring import about

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    section = SECTIONS[name]
    file, _, function = section.checks.partition(".")
    make: Callable[..., list[Check]] = getattr(import_module(f"benchmarks.{file}"), function)
    rows = [known.get(section.behind, [])] if section.behind else []
    return make(device, smoke, seconds, *rows), about(device)

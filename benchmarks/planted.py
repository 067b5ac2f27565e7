"""Checks that fail in every way that a check can fail on a device: does the rest of the call survive them?"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.checks import Check


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    return [
        Check("passes", lambda: passes("first")),
        Check("raises without a message", _raises),
        Check("runs out of memory", lambda: _out_of_memory(device)),
        Check("hangs", _hangs, limit=1.0),
        Check("is killed", _killed),
        Check("gives a row, then ends its process", _ends),
        Check("passes at the end", lambda: passes("last")),
    ]


def passes(value: str) -> Iterator[dict[str, Any]]:
    yield {"check": "passes", "value": value}


def _raises() -> Iterator[dict[str, Any]]:
    raise ValueError


def _out_of_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    yield {"check": "runs out of memory", "value": torch.empty(2**60, dtype=torch.int8, device=device).numel()}


def _hangs() -> Iterator[dict[str, Any]]:
    time.sleep(600)
    yield {}


def _killed() -> Iterator[dict[str, Any]]:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
    yield {}


def _ends() -> Iterator[dict[str, Any]]:
    yield {"check": "gives a row, then ends its process", "value": "a row"}
    os._exit(3)

"""W&B without W&B: a stand-in for its package."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any


def fake_wandb(monkeypatch, calls: list[Any], fail: Exception | None = None) -> list[Any]:
    """Puts a package in W&B's place that notes its calls in `calls`, which it returns, or fails to start."""

    def init(**settings):
        if fail:
            raise fail
        calls.append(("init", settings))
        return types.SimpleNamespace(
            log=lambda numbers, step: calls.append(("log", step, numbers)), finish=lambda: calls.append(("finish",))
        )

    spec = importlib.machinery.ModuleSpec("wandb", None)  # others look whether it can be imported
    package = types.SimpleNamespace(init=init, Image=lambda picture: picture, __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return calls

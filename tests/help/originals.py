"""torchvision and open_clip, to compare with: never dependencies, and better not beside transformers, which would import them too.

`.ci/run` installs them into a folder of their own and names that in DPO_NEEDS_ORIGINALS; without, their tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

KEPT: list[torch.library.Library] = []  # a library takes its operators with it when it goes


def original(name: str) -> ModuleType:
    """A module of them. Where it is not installed the test is skipped, or fails with DPO_NEEDS_ORIGINALS."""
    for operator in ("nms", "qnms"):  # torchvision's import describes operators that a CPU build of torch lacks
        if not hasattr(torch.ops.torchvision, operator):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)
    wanted = os.environ.get("DPO_NEEDS_ORIGINALS", "")
    before = sys.path[:]
    sys.path += [wanted] * bool(wanted)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if wanted:
            raise
        pytest.skip(f"{name} is not installed ({error})")
    finally:
        sys.path[:] = before


def photographs() -> list[Path]:
    """scikit-image's, which lie beside them; the test is skipped, or fails, as with `original`."""
    wanted = os.environ.get("DPO_NEEDS_ORIGINALS", "")
    if not wanted:
        pytest.skip("scikit-image is not installed")
    names = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")
    found = [Path(wanted) / "skimage" / "data" / name for name in names]
    assert all(path.is_file() for path in found)
    return found

"""torchvision, to compare with: never a dependency, and better not beside transformers, which then imports it too.

`.ci/run` installs it into a folder of its own and names that in DPO_NEEDS_TORCHVISION; without, its tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import pytest
import torch

KEPT: list[torch.library.Library] = []  # a library takes its operators with it when it goes


def torchvision(name: str = "torchvision") -> ModuleType:
    """A module of torchvision. Where it is not installed the test is skipped, or fails with DPO_NEEDS_TORCHVISION."""
    for operator in ("nms", "qnms"):  # its import describes operators that a CPU build of torch lacks
        if not hasattr(torch.ops.torchvision, operator):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)
    wanted = os.environ.get("DPO_NEEDS_TORCHVISION", "")
    sys.path.append(wanted)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if wanted:
            raise
        pytest.skip(f"{name} is not installed ({error})")
    finally:
        sys.path.remove(wanted)

"""What differs between Linux, macOS and Windows."""

from __future__ import annotations

import os
import sys
from typing import Literal


def usable_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start_method() -> Literal["fork", "spawn"]:
    """How a child process starts: a copy of this one on Linux; a fresh one elsewhere, where copies crash or cannot be."""
    return "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"

"""What differs between Linux, macOS and Windows."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

CGROUP = Path("/sys/fs/cgroup")
# A container's files: its limit, what it uses, and where of that the cache of files stands, which is given back when asked.
CONTAINER = (
    ("memory.max", "memory.current", ("memory.stat", "inactive_file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("memory/memory.stat", "total_inactive_file")),
)


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


def free_memory() -> int:
    """Memory that this process may still take, in bytes: of the machine, or what its container's limit leaves."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used, cache in CONTAINER:
        try:
            found = dict(line.split() for line in (CGROUP / cache[0]).read_text().splitlines())
            left = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()) + int(found.get(cache[1], 0))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        free = min(free, left)
    return max(free, 0)


def start_method() -> Literal["fork", "spawn"]:
    """How a child process starts: a copy of this one on Linux; a fresh one elsewhere, where copies crash or cannot be."""
    return "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"

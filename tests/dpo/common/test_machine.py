"""dpo.common.machine: what Linux, macOS and Windows say of themselves, in one unit."""

import multiprocessing
import os
import sys
from types import SimpleNamespace

import pytest

from dpo.common import machine


def test_cores_where_the_system_does_not_say_which(monkeypatch):
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.usable_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(monkeypatch, platform, unit):
    """ru_maxrss is in KiB on Linux and in bytes on macOS."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=7 << 20))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert machine.peak_memory() == (7 << 20) * unit


def test_peak_memory_without_the_module_resource(monkeypatch):
    pytest.importorskip("psutil")  # which on Linux imports resource itself
    with_it = machine.peak_memory()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.2 * with_it < machine.peak_memory() < 5 * with_it
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5, rss=3))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert machine.peak_memory() == 5


def test_children_are_copies_on_linux_alone(monkeypatch):
    assert machine.start_method() == "fork"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.start_method() == "spawn"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "fork")
    assert machine.start_method() == "spawn" and "spawn" in multiprocessing.get_all_start_methods()


@pytest.mark.parametrize("limit, left", [("max", 1000), ("700", 700 - 300 + 50)])
def test_free_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path, limit, left):
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    monkeypatch.setitem(sys.modules, "psutil", memory)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.free_memory() == 1000
    for name, text in {"memory.max": limit, "memory.current": "300", "memory.stat": "anon 9\ninactive_file 50"}.items():
        (tmp_path / name).write_text(text)
    assert machine.free_memory() == left

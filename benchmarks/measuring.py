"""Timing, the copy bandwidth that kernels are held against, and results that are on disk as soon as they are known."""

from __future__ import annotations

import csv
import datetime
import gc
import inspect
import io
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dpo.common.files import write_text

RESULTS = "results.json"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "bitsandbytes", "peft")


def median_seconds(work: Callable[[], Any], device: torch.device, budget: float = 0.3) -> float:
    """Median time of one call. On a GPU with cold L2 cache (triton's do_bench); on a CPU the median of a few calls."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(work, warmup=50, rep=int(1000 * budget), return_mode="median") / 1e3
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 20):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a device-to-device copy, read plus written: what "100 %" means for a kernel that only moves
    bytes.
    """
    count = 2**28 if device.type == "cuda" else 2**22
    source = torch.empty(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(CUDA graph of `work`, what it returned, in memory that a replay writes anew), after three runs on a stream of
    its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


def device_seconds(work: Callable[[], Any], device: torch.device, budget: float = 0.3) -> float:
    """Median time of one call without the host's share: a CUDA graph of it is replayed. On a CPU as `median_seconds`."""
    if device.type != "cuda":
        return median_seconds(work, device, budget)
    graph, _ = captured(work)
    return median_seconds(graph.replay, device, budget)


def host_seconds(work: Callable[[], Any], device: torch.device, calls: int = 20) -> float:
    """Mean time until a call returns, the device's work still to be done: few calls, so that no queue is full."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def about(device: torch.device) -> dict[str, Any]:
    """Device, versions and date, for every result file."""
    found = {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
    found["device"] = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    )
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


class Results:
    """Rows by section: every `add` rewrites results.json and the section's CSV, so that a cut-off run keeps what it
    has.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header = header
        self.rows: dict[str, list[dict[str, Any]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(section, []).append(row)
        text = io.StringIO()
        columns = list(dict.fromkeys(key for known in self.rows[section] for key in known))
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self.rows[section])
        self.write(f"{section}.csv", text.getvalue())
        self.write(RESULTS, json.dumps({"about": self.header, **self.rows}, indent=1))

    def write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table; numbers to three figures, a missing value as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def peak_of_update(run: Any) -> int:
    """Bytes at the peak of the next update of a Run on a CPU: what torch's allocator itself reports, and what was held before.

    Make an update before, so that the optimizer has its states.
    """
    from dpo.train import train_step

    batches = run.batches()
    gc.collect()
    held = _bytes(_held(run))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_step(run, itertools.islice(batches, run.config.optim.accumulation))
    run.count()
    batches.close()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return held + max(itertools.accumulate(sizes))


def _held(run: Any) -> Iterable[Tensor]:
    """What a run holds between two updates: modules, states and averaged weights."""
    modules = [run.model.denoiser, run.model.vae, *run.model.text_encoders]
    if run.step.reference is not None and (twin := inspect.getclosurevars(run.step.reference).nonlocals.get("twin")):
        modules.append(twin.args[0])
    for module in modules:
        yield from (*module.parameters(), *module.buffers())
    states = tree_leaves([list(run.updater.optimizer.state.values()), getattr(run.updater.optimizer, "_tensors", None)])
    yield from (state for state in states if isinstance(state, Tensor))
    yield from run.updater.ema


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

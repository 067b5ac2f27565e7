"""Memory of writing a run's result, drawing its sample images and exporting it, at one commit or several.

    python -m benchmarks.saving [COMMIT ...] [--size tiny|mid] [--times 3] [--out FOLDER]
    python -m benchmarks.saving 60563b8 HEAD                    two commits; "." is the working tree

A random SDXL pipeline on the CPU, one thread. Each figure is from a process of its own, with the code of the commit, after
one update (none in bf16, where a CPU takes minutes for it, nor before an export, which has no run) and after the same work on
the tiny pipeline, so that all libraries are there. "MiB more" is
the most resident memory during the work (VmHWM of /proc/self/status, reset before it) less what was resident when it began
(VmRSS, after gc and malloc_trim): the median of the times, beside the least and the most. Linux alone lets it be reset.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

RUNS: dict[str, tuple[str, ...]] = {  # by work: flags of the run
    "result, all weights": (),
    "result, all weights, bf16": ("--precision", "bf16"),
    "result, LoRA": ("--lora", "--rank", "8"),
    "sample images": (),
}
DRAWN = ("--sample-steps", "2", "--sample-prompts", "a red fox", "two birds", "--sample-seeds", "0", "1")
EXPORTS = {"export, single file": "single-file", "export, ComfyUI": "comfyui"}
WORKS = [*RUNS, *EXPORTS]
COLUMNS = ["work", "commit", "MiB more", "least", "most", "times", "MiB held", "MiB written"]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """MiB that are resident before `work`, and the most that it makes them more."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library: it gives back what is free by itself
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    RESET.write_text("5")  # proc(5): the peak begins again here
    held = _resident("VmRSS")
    work()
    return {"MiB held": held / MIB, "MiB more": (_resident("VmHWM") - held) / MIB}


def _resident(name: str) -> int:
    """Bytes that /proc/self/status says."""
    (found,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(found.split()[1])


def work_of(name: str, model: Path, pairs: Path, out: Path) -> Callable[[], Any]:
    """What is measured, all before it done."""
    if name in EXPORTS:
        from dpo import export

        words = [str(model), "--to", EXPORTS[name], "--output", str(out / "exported.safetensors")]

        def exported() -> None:
            if export.main(words):
                raise RuntimeError("the export failed")

        return exported
    from benchmarks.prepare import make_run
    from dpo.train import train_step
    from dpo.training import results, samples

    run = make_run(model, pairs, out, 1, *RUNS[name], *DRAWN)
    if "bf16" not in RUNS[name]:
        batches = run.batches()
        train_step(run, itertools.islice(batches, 1))
        batches.close()
    if name != "sample images":
        return lambda: results.write(run)

    def drawn() -> None:
        samples.before(run)
        samples.write(run)

    return drawn


def alone(name: str, root: Path, size: str) -> dict[str, float]:
    """The figures of one work on the pipelines of `ready`, in this process, which does nothing else."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=root) as place:
        first, out = Path(place) / "tiny", Path(place) / "out"
        for folder in (first, out):
            folder.mkdir()
        work_of(name, root / "tiny", root / "tiny-pairs", first)()
        work = work_of(name, root / size, root / f"{size}-pairs", out)
        before = _bytes(out)
        return measured(work) | {"MiB written": (_bytes(out) - before) / MIB}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def child(tree: Path, name: str, root: Path, size: str) -> dict[str, float]:
    """The figures of one work from a new process with the code of `tree`, but this file."""
    words = [sys.executable, "-P", str(Path(__file__).resolve()), "--alone", name, "--root", str(root), "--size", size]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{name} at {tree}: {ended.stderr.strip()[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def ready(root: Path, sizes: Sequence[str]) -> None:
    """A pipeline and pairs of each size."""
    from benchmarks.prepare import SIZES, make_model, make_pairs

    for size in sizes:
        make_model(root / size, SIZES[size], "sdxl")
        make_pairs(root / f"{size}-pairs", SIZES[size]["side"])


def row(name: str, commit: str, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    more = [each["MiB more"] for each in found]
    middle = {key: round(statistics.median(each[key] for each in found), 1) for key in found[0]}
    bounds = {"least": round(min(more), 1), "most": round(max(more), 1), "times": len(found)}
    return {"work": name, "commit": commit} | middle | {"MiB held": round(middle["MiB held"])} | bounds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.saving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="default: the working tree")
    parser.add_argument("--size", choices=("tiny", "mid"), default="mid", help="the pipeline (default: mid)")
    parser.add_argument("--times", type=int, default=3, help="processes of each figure (default: 3)")
    parser.add_argument("--work", choices=WORKS, nargs="+", default=WORKS, help="default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/saving"), help="folder of the table (default: %(default)s)"
    )
    parser.add_argument("--alone", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args(argv)
    if own.alone:
        print(json.dumps(alone(own.alone, own.root, own.size)))
        return 0

    import torch

    from benchmarks.losses import checkout
    from benchmarks.measuring import Results, about, markdown

    torch.set_num_threads(1)
    results = Results(own.out, about(torch.device("cpu")) | {"size": own.size})
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saving-")))
        ready(root, list(dict.fromkeys(["tiny", own.size])))
        trees = {commit: stack.enter_context(checkout(commit)) for commit in own.commits or ["."]}
        for name in own.work:
            able = {c: tree for c, tree in trees.items() if name in RUNS or (tree / "dpo/export.py").is_file()}
            found: dict[str, list[dict[str, float]]] = {commit: [] for commit in able}
            for _, (commit, tree) in itertools.product(range(own.times), able.items()):  # in turns
                found[commit].append(child(tree, name, root, own.size))
            for commit in trees:
                made = row(name, commit, found[commit]) if commit in found else {"work": name, "commit": commit}
                results.add("saving", made)
                print(*(f"{key}={value}" for key, value in made.items()), flush=True)
    text = markdown(results.rows["saving"], COLUMNS)
    results.write("saving.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory and speed of drawing and of scoring by the number of images, and the share of drawing outside the UNet.

    python -m benchmarks.sampling [--drawn 100 1000] [--scored 500 5000] [--out FOLDER]

Each row is a process of its own on the CPU, with one thread. Drawn: python -m dpo.sample with the embedded model, by the
protocol of python -m dpo.evaluate without arguments. Scored: python -m dpo.evaluate of two folders of 64 x 64 pixels by
tiny-b, with statistics and page. "peak MiB" is the most memory that the process ever had, libraries and all; images/s
and "outside UNet %" are of the drawing or the scoring alone, by the clock. "KiB more an image" is against the row above.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import Results, about, markdown
from dpo import evaluate, sample
from dpo.tiny import outcome

PROMPTS = 100  # at most; the rest are seeds of these
COLUMNS = ["work", "images", "peak MiB", "KiB more an image", "images/s", "outside UNet %"]


def drawing(count: int, root: Path) -> dict[str, Any]:
    """A row on drawing `count` images, a multiple of PROMPTS or fewer. For a process of its own."""
    from dpo.drawing import images

    paces: list[images.Pace] = []
    work = images.draw_set

    def kept(*args: Any, **kwargs: Any) -> images.Pace:
        paces.append(work(*args, **kwargs))
        return paces[-1]

    images.draw_set = kept
    prompts = min(count, PROMPTS)
    words = [
        "embedded",
        "--prompts",
        outcome.PROMPTS,
        *outcome.DRAWN,
        "--subset",
        str(prompts),
        "--seeds",
        str(count // prompts),
    ]
    _run(sample.main, [*words, "--device", "cpu", "--output", str(root / "out")])
    (pace,) = paces
    row = {"work": "drawing", "images": pace.drawn, "peak MiB": peak_mib()}
    return row | {"images/s": pace.rate, "outside UNet %": 100 * pace.outside}


def scoring(count: int, root: Path) -> dict[str, Any]:
    """A row on scoring `count` images, half on either side. For a process of its own."""
    from dpo.evaluating import work

    seconds = 0.0
    scores = work.scores

    def timed(*args: Any, **kwargs: Any) -> np.ndarray:
        nonlocal seconds
        began = time.perf_counter()
        found = scores(*args, **kwargs)
        seconds += time.perf_counter() - began
        return found

    work.scores = timed  # type: ignore[assignment]
    sides = [make_folder(root / name, count // 2, seed) for seed, name in enumerate("ab")]
    _run(evaluate.main, [*map(str, sides), "--scorers", "tiny-b", "--output", str(root / "out")])
    row = {"work": "scoring", "images": 2 * (count // 2), "peak MiB": peak_mib()}
    return row | {"images/s": row["images"] / seconds}


def make_folder(folder: Path, count: int, seed: int) -> Path:
    """`count` images of noise with a prompt each."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((64, 64)).save(folder / f"{number:05d}.png")
    rows = "".join(f"{number:05d}.png,picture {number}\n" for number in range(count))
    (folder / "prompts.csv").write_text("file,prompt\n" + rows, "utf-8")
    return folder


def peak_mib() -> float:
    """The most memory that this process ever had, MiB. POSIX alone says it."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def _run(main: Any, words: list[str]) -> None:
    torch.set_num_threads(1)
    if main(words):
        raise RuntimeError("the command failed: " + " ".join(words))


def measured(work: Any, count: int) -> dict[str, Any]:
    """The row of `work` on `count` images, from a new process."""
    with tempfile.TemporaryDirectory() as root:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, count, Path(root)).result()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drawn", type=int, nargs="*", default=[100, 1000], help="images to draw (default: 100 1000)")
    parser.add_argument("--scored", type=int, nargs="*", default=[500, 5000], help="to score (default: 500 5000)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/sampling"),
        help="folder of the table (default: %(default)s)",
    )
    own = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(own.out, about(torch.device("cpu")))
    for work, counts in ((drawing, own.drawn), (scoring, own.scored)):
        before: dict[str, Any] | None = None
        for count in counts:
            row = measured(work, count)
            if before is not None and row["images"] != before["images"]:
                more = 1024 * (row["peak MiB"] - before["peak MiB"])
                row["KiB more an image"] = more / (row["images"] - before["images"])
            results.add("sampling", row)
            before = row
    text = markdown(results.rows.get("sampling", []), COLUMNS)
    results.write("sampling.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

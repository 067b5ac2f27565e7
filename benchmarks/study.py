"""Do the methods do what the papers say? Methods x seeds on the embedded world, judged on prompts that chose no
setting.

    python -m benchmarks.study --out runs/study [--seeds 5] [--rows dpo "dpo, LoRA" ...] [--processes 2]
                               [--cells benchmarks/results/study.json] [--report docs/evidence.md]

Cells of the same pairs train from one prepared store. A finished cell is written to the file of --cells and never run
again while its flags and its judge stay the same, so the study can be stopped, continued, and continued elsewhere; where
another judges by now, a run that is still there ends again, which compares its images anew. With `--seeds 0` it only writes the report. The
table says of every row how many seeds it stands on; a row without any is marked so. Names of rows have blanks: quote them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.apart import told_apart
from benchmarks.claims import table_of
from benchmarks.evidence import write_report
from benchmarks.measuring import markdown
from benchmarks.study_rows import DETAIL, JUDGED, MEASURED, QUARTERS, ROWS, TABLED, Cell, Cells
from dpo.common import files
from dpo.common.machine import usable_cores
from dpo.pages.figures import DECILES
from dpo.pages.folder import EVALUATION, read_run
from dpo.tiny import judge, outcome, paths
from dpo.tiny.world import SLOPE

_stop: Any = None  # in a process of the pool: the event that tells it to start nothing more


def soft_pairs(path: Path) -> Path:
    """The training pairs with each label replaced by the probability of the taste that drew it, read by the judge that
    labelled.
    """
    import pyarrow.parquet as pq
    from PIL import Image

    from dpo.tiny.judge import score

    if path.exists():
        return path
    table = pq.read_table(paths.train_pairs_path())
    labeller = judge.load_judge("a")

    def scores(column: str) -> np.ndarray:
        images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table[column].to_pylist()]
        return score(labeller.read(np.stack(images)))

    first = 1 / (1 + np.exp(-SLOPE * (scores("jpg_0") - scores("jpg_1"))))
    return relabelled(path, table, first)


def swapped_pairs(path: Path) -> Path:
    """The training pairs with winner and loser exchanged: a trainer that learns from labels learns the opposite."""
    import pyarrow.parquet as pq

    if path.exists():
        return path
    table = pq.read_table(paths.train_pairs_path())
    return relabelled(path, table, table["label_1"].to_numpy())


def labelled_pairs(path: Path) -> Path:
    """The training pairs as `python -m dpo.label` labels them by the judge whose taste the noisy labels were drawn from."""
    from dpo import label

    folder = path.with_suffix("")
    words = ["--data", paths.train_pairs_path(), "--scorers", "tiny-a", "--output", folder]
    if label.main([str(word) for word in words]):
        raise SystemExit(f"{folder} could not be labelled")
    return folder


def detail_pairs(path: Path) -> Path:
    """The training pairs of the second taste."""
    from dpo.tiny.making import detail

    detail.write(path.with_suffix(""))
    return path.with_suffix("") / "train.parquet"


def relabelled(path: Path, table: Any, first: np.ndarray) -> Path:
    """Writes the pairs with `first` [N] as the probability that jpg_0 is the better one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, values in (("label_0", first), ("label_1", 1 - first)):
        index = table.schema.get_field_index(name)
        table = table.set_column(
            index, table.schema.field(index), pa.array(values, type=table.schema.field(index).type)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, lambda part: pq.write_table(table, part))
    return path


# What a row is trained on whose name says so, instead of the shipped pairs.
LABELS: dict[str, Callable[[Path], Path]] = {
    "soft labels": soft_pairs,
    "swapped labels": swapped_pairs,
    "judged labels": labelled_pairs,
    DETAIL.removeprefix(", for "): detail_pairs,
}


def labels_of(row: str) -> str | None:
    """The entry of LABELS that the name of a row has."""
    return next((name for name in LABELS if name in row), None)


def store_of(out: Path, row: str) -> Path:
    labels = labels_of(row)
    return out / (f"store-{labels.split()[0]}" if labels else "store")


def prepare_stores(out: Path, rows: Iterable[str]) -> None:
    """Encode the pairs that the rows train on, once."""
    from dpo import prepare

    for store, labels in {store_of(out, row): labels_of(row) for row in rows}.items():
        pairs = LABELS[labels](out / f"{labels.split()[0]}.parquet") if labels else paths.train_pairs_path()
        flags = [
            "--store",
            store,
            "--dtype",
            "fp32",
            "--preset",
            "tiny",
            "--model",
            paths.pipeline_path(),
            "--data",
            pairs,
        ]
        if prepare.main([str(flag) for flag in flags]):
            raise SystemExit(f"{store} could not be prepared")


def folder_of(out: Path, row: str, seed: int) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in row) / f"seed-{seed}"


def finished_cell(folder: Path, row: str) -> Cell | None:
    """What the judge said of a finished run, the flags that made it, and how its correction table came to be.

    `judged_by`: the fingerprint of that judge.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if summary.get("status") != "finished" or not summary.get("evaluation"):
        return None
    history = table_history(folder) if row in TABLED else measured(folder) if row in MEASURED else {}
    return summary["evaluation"] | judged_by(folder) | {"flags": ROWS[row]} | history


def judged_by(folder: Path) -> Cell:
    """`judged_by`: the fingerprint of the scorer that counts, as a run's comparison says; empty where there is none."""
    try:
        told = json.loads((folder / EVALUATION / "evaluation.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {"judged_by": told["scorers"][0]["fingerprint"]}


@cache
def fingerprint_of(scorer: str) -> str:
    import torch

    from dpo.scorers.scorer import opened

    return opened(scorer, device=torch.device("cpu")).fingerprint


def is_current(row: str, cell: Cell) -> bool:
    """Whether a cell was made by the flags of its row, and judged by what judges it now."""
    known = fingerprint_of(JUDGED[1] if row.endswith(DETAIL) else outcome.JUDGE)
    unsaid = None if row.endswith(DETAIL) else known  # those of the first taste are from before it was said
    return cell["flags"] == ROWS[row] and cell.get("judged_by", unsaid) == known


def table_history(folder: Path) -> dict[str, Any]:
    """`table` and `correction` [4, 10]: M and C by tenth of the timesteps, at the end of each quarter of the run.

    For `dde-step`, whose weight is 1, also what M estimates.
    """
    run = read_run(folder)
    ends = [run.updates[round(len(run.updates) * (quarter + 1) / QUARTERS) - 1] for quarter in range(QUARTERS)]
    found = {name: [end[f"{name}_by_decile"] for end in ends] for name in ("table", "correction")}
    return found | (measured(folder) if run.method == "dde-step" else {})


def measured(folder: Path) -> dict[str, Any]:
    """`measured` [10]: d by tenth of the timesteps, its mean over the last quarter of a run whose weight is 1 everywhere.

    It follows from the recorded margins z = -(beta/2) (d + C). (A tie has no C, but the stores of this study hold none.)
    """
    run = read_run(folder)
    total, pairs = np.zeros(DECILES), np.zeros(DECILES)
    for update in run.updates[-(len(run.updates) // QUARTERS) :]:
        n = np.array(update["pairs_by_decile"])
        z = np.array([margin or 0.0 for margin in update["margin_by_decile"]])  # None where there was no pair
        total += n * (-2 / run.setting("beta") * z - np.array(update.get("correction_by_decile", 0.0)))
        pairs += n
    return {"measured": (total / np.maximum(pairs, 1)).tolist()}


def read_cells(path: Path) -> Cells:
    """The finished cells of the file, but for those whose row has other flags or another judge by now."""
    known: dict[str, dict[str, Cell]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {row: {int(n): cell for n, cell in known.get(row, {}).items() if is_current(row, cell)} for row in ROWS}


def missing(cells: Cells, row: str, seed: int) -> bool:
    """Whether a cell is to be run: it is not there, or lacks what its row keeps by now."""
    return seed not in cells[row] or (row in MEASURED and "measured" not in cells[row][seed])


def write_cells(path: Path, cells: Cells) -> None:
    files.write_text(path, json.dumps({row: found for row, found in cells.items() if found}, indent=1) + "\n")


def run_cell(out: Path, row: str, seed: int) -> tuple[Cell | None, str]:
    """One training run, continued where it was cut off: (what came of it, a line to print)."""
    from dpo import train

    if _stop is not None and _stop.is_set():
        return None, f"{row}, seed {seed}: not started"
    folder = folder_of(out, row, seed)
    note = folder / "flags.json"
    if not note.exists() or json.loads(note.read_text("utf-8")) != ROWS[row]:  # nothing is continued under other flags
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files.write_text(note, json.dumps(ROWS[row]))
    going_on = ["--resume", "latest"] if any((folder / "checkpoints").glob("step-*")) else ["--overwrite"]
    flags = [
        "--preset",
        "tiny",
        *ROWS[row],
        "--model",
        paths.pipeline_path(),
        "--data",
        store_of(out, row),
        "--seed",
        seed,
    ]
    flags += ["--output", folder, "--threads", 1, "--validate-every", 0, "--no-samples", *going_on]
    code = train.main([str(flag) for flag in flags])
    if code:
        return None, f"{row}, seed {seed}: ended with {code}, see {out / f'process-{os.getpid()}.log'}"
    return finished_cell(folder, row), f"{row}, seed {seed}: done"


def begin_process(out: Path, stop: Any) -> None:
    """What a process of the pool prints goes into a file of its own; `stop` tells it to start nothing more."""
    global _stop
    _stop = stop
    log = os.open(out / f"process-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)


def run_cells(out: Path, todo: list[tuple[str, int]], processes: int) -> Iterator[tuple[str, int, Cell | None]]:
    """Each cell on one thread; a process that has drawn the unchanged model's images once keeps them for its next
    cells.
    """
    prepare_stores(out, {row for row, _ in todo})
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(processes, context, initializer=begin_process, initargs=(out, stop)) as pool:
        running = {pool.submit(run_cell, out, row, seed): (row, seed) for row, seed in todo}
        try:
            for done in as_completed(running):
                row, seed = running[done]
                try:
                    cell, line = done.result()
                except Exception as error:  # one cell's trouble costs that cell
                    cell, line = None, f"{row}, seed {seed}: {type(error).__name__}: {error}"
                print(line, flush=True)
                yield row, seed, cell
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the cells")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default: 5)")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of: {'; '.join(ROWS)}"
    )
    parser.add_argument("--processes", type=int, default=usable_cores(), help="cells at a time, one thread each")
    parser.add_argument("--report", type=Path, help="page to write, for example docs/evidence.md")
    parser.add_argument(
        "--cells", type=Path, help="file of the finished cells, read and added to (default: OUT/cells.json)"
    )
    given = parser.parse_args(None if argv is None else list(argv))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.cells or given.out / "cells.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = read_cells(path)
    if todo := [(row, seed) for seed in range(given.seeds) for row in given.rows if missing(cells, row, seed)]:
        try:
            with closing(run_cells(given.out, todo, given.processes)) as found:
                for row, seed, cell in found:
                    if cell:
                        cells[row][seed] = cell
                        write_cells(path, cells)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on from here") from None
    print(markdown(table_of(cells), ["method", "seeds", "win rate", "95 % interval", "captions obeyed after"]))
    if given.report:
        detail = detail_pairs(given.out / "detail.parquet")
        apart = {"": told_apart(paths.train_pairs_path()), DETAIL: told_apart(detail)}
        write_report(given.report, cells, path, apart)
    return 0


if __name__ == "__main__":
    sys.exit(main())

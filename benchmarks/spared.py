"""What a training step is spared: the same micro-step as it is, and with work put back that it does without, in turns.

    python -m benchmarks.spared [--size tiny|mid ...] [--precision fp32|bf16 ...] [--rounds N] [--out FOLDER]

Put back are, in the rows "adapters", peft's own forward, which casts each input to the adapter's fp32 and multiplies by a
scaling of 1; in the rows "all" also diffusers' attention, which divides by 1, and the way of our operations through
torch's dispatcher. Both take turns within a round, in one process and one thread, on one encoded micro-batch with a live
reference; time is that of the process, so a busy machine slows both alike, and the ratio is the median of the rounds' own,
beside their quartiles. Operations are counted in one micro-step, backward included; one of this package counts as one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.host import dispatched
from benchmarks.measuring import Results, about, markdown
from benchmarks.prepare import SIZES, make_model, make_pairs, make_run
from dpo.models.attention import Attending
from dpo.training.run import Run

PRECISIONS = ("fp32", "bf16")
TRAINED: dict[str, tuple[str, ...]] = {"full": (), "lora": ("--lora", "--rank", "8")}
COUNTED = {"casts": "aten._to_copy", "products": "aten.mul", "divisions": "aten.div"}

PutBack = Callable[[], AbstractContextManager[Any]]


@contextmanager
def pefts_forward(denoiser: nn.Module) -> Iterator[None]:
    """Inside the block adapters go peft's own way, that of their class."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = {m: m.__dict__.pop("forward") for m in denoiser.modules() if isinstance(m, BaseTunerLayer)}
    try:
        yield
    finally:
        for module, forward in own.items():
            module.__dict__["forward"] = forward


@contextmanager
def diffusers_attention() -> Iterator[None]:
    """Inside the block attention, the reference's too, goes by diffusers' own processor."""
    own = Attending.__call__
    Attending.__call__ = lambda self, *args, **kwargs: self._other(*args, **kwargs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Attending.__call__ = own  # type: ignore[method-assign]


@contextmanager
def everything(denoiser: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for block in (pefts_forward(denoiser), diffusers_attention(), dispatched()):
            stack.enter_context(block)
        yield


def put_back(run: Run) -> dict[str, PutBack]:
    """By name: inside of what the step does more."""
    found: dict[str, PutBack] = {"all": partial(everything, run.model.denoiser)}
    return found | ({"adapters": partial(pefts_forward, run.model.denoiser)} if run.config.lora.lora else {})


class Operations(TorchDispatchMode):
    """Counts the operations inside, and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.calls[str(func.overloadpacket)] += 1
        if not func.is_view:
            self.written += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def micro_step(run: Run) -> Callable[[], torch.Tensor]:
    """Forward, loss and backward of one encoded micro-batch of the run; returns the losses."""
    with closing(run.batches()) as batches:
        inputs = run.encoder.inputs(next(batches))
    correction = run.correction()

    def work() -> torch.Tensor:
        loss = run.step(inputs, correction).loss
        loss.sum().backward()
        return loss.detach()

    return work


def row(run: Run, name: str, block: PutBack, rounds: int) -> dict[str, Any]:
    """A row of the table, from `rounds` turns of both ways after one that warms up."""
    work, both = micro_step(run), {"before": block, "now": nullcontext}
    times: dict[str, list[float]] = {way: [] for way in both}
    for number, (way, entered) in itertools.product(range(rounds + 1), both.items()):
        with entered():
            began = time.process_time()
            work()
        times[way] += [time.process_time() - began] if number else []
    ratios = [slow / fast for slow, fast in zip(*times.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    found: dict[str, Any] = {"put back": name, "rounds": rounds, "now, CPU ms": 1e3 * statistics.median(times["now"])}
    found |= {"before / now": round(middle, 3), "quartiles": f"{low:.3f} to {high:.3f}"}
    for way, entered in both.items():
        with entered(), Operations() as seen:
            work()
        found[f"operations {way}"] = seen.calls.total()
        found |= {f"{told} {way}": seen.calls[operation] for told, operation in COUNTED.items()}
        found[f"MB written {way}"] = seen.written / 1e6
    return found


def rows(size: str, precision: str, trained: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of a pipeline, a precision and what is trained."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        root, shape = Path(place), SIZES[size]
        model, pairs = make_model(root / "model", shape), make_pairs(root / "pairs", shape["side"])
        run = make_run(
            model, pairs, root / "run", shape["batch"], "--precision", precision, "--keep-encoded", "off", *TRAINED[trained]
        )  # fmt: skip
        for name, block in put_back(run).items():
            yield {"size": size, "precision": precision, "trained": trained} | row(run, name, block, rounds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.spared", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=41, help="turns of both ways, at least 2 (default: 41)")
    parser.add_argument("--size", choices=tuple(SIZES), nargs="+", default=list(SIZES), help="pipelines (default: all)")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="default: both")
    parser.add_argument("--train", choices=tuple(TRAINED), nargs="+", default=list(TRAINED), help="default: both")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/spared"), help="folder of the table (default: %(default)s)"
    )
    own = parser.parse_args(argv)
    if own.rounds < 2:
        parser.error(f"--rounds {own.rounds}: at least 2, which quartiles need")
    torch.set_num_threads(1)
    results = Results(own.out, about(torch.device("cpu")))
    for size, precision, trained in itertools.product(own.size, own.precision, own.train):
        for found in rows(size, precision, trained, own.rounds):
            results.add("spared", found)
            print(*(f"{key}={value}" for key, value in found.items()), flush=True)
    text = markdown(results.rows["spared"], list(results.rows["spared"][0]))
    results.write("spared.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a call of each operation costs the host: the short way of csrc_triton/op.py beside that of torch's dispatcher.

    python -m benchmarks.host [--rounds N] [--out FOLDER]

Tensors have a few numbers, so that the arithmetic is nothing and the way to it all: the plain forms, on the CPU, in one
thread. Both ways take turns within a round, and time is that of the process, so a busy machine slows both alike; the
ratio is the median of the rounds' own, beside their quartiles. What a launch of a kernel takes comes on top on a GPU, and is not here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measuring import Results, about, markdown
from csrc_triton import op
from csrc_triton.geglu import geglu
from csrc_triton.group_norm_silu import group_norm_silu
from csrc_triton.layer_norm import add_layer_norm, layer_norm
from csrc_triton.noising import noise_pairs, sample_posterior
from csrc_triton.pair_errors import pair_errors

CALLS = 20  # of each way in a round
COLUMNS = ["op", "direction", "short us", "dispatcher us", "dispatcher / short", "quartiles", "saved us"]


class Case(NamedTuple):
    """A call of an operation; leaves: what a gradient is asked for, none where the operation has none."""

    name: str
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]


def cases() -> Iterator[Case]:
    """Every operation of the package, on tensors of a few numbers."""
    x, wide, image = torch.randn(2, 8), torch.randn(2, 16), torch.randn(2, 4, 2, 2)
    weight, bias, noise = torch.randn(8), torch.randn(8), torch.randn(1, 4, 2, 2)
    for leaf in (x, wide, image, weight, bias):
        leaf.requires_grad_()
    scale, shift = weight[:4].detach().requires_grad_(), bias[:4].detach().requires_grad_()
    yield Case("geglu", lambda: geglu(wide), [wide])
    yield Case("group_norm_silu", lambda: group_norm_silu(image, scale, shift, 2), [image, scale, shift])
    yield Case("layer_norm", lambda: layer_norm(x, weight, bias), [x, weight, bias])
    yield Case("add_layer_norm", lambda: add_layer_norm(x, x, weight, bias), [x, weight, bias])
    t, keys, draws, seed = torch.tensor([3]), torch.tensor([5]), torch.tensor([0]), torch.tensor(7)
    table, one = torch.linspace(0.9, 0.1, 10), torch.ones(1)
    still = image.detach()

    def errors() -> Tensor:
        return pair_errors(image, t, one, one, table, table, torch.tensor(2.0), reference=still, target=noise).logit

    yield Case("pair_errors", errors, [image])
    yield Case("noise_pairs", lambda: noise_pairs(still, t, table, table, keys, draws, seed), [])
    yield Case("sample_posterior", lambda: sample_posterior(still, still.abs(), keys, draws, seed, 0.18), [])


@contextmanager
def dispatched() -> Iterator[None]:
    """Inside the block every call goes the dispatcher's way, as it did before there was another."""
    short = op._eager
    op._eager = lambda args: False
    try:
        yield
    finally:
        op._eager = short


def works(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(direction, what is timed) of a case: the forward without a gradient, and forward and backward together."""

    def forward() -> Any:
        with torch.no_grad():
            return case.call()

    def both() -> tuple[Tensor, ...]:
        found = case.call()
        outputs = (found,) if isinstance(found, Tensor) else found
        return torch.autograd.grad(outputs, case.leaves, [torch.ones_like(output) for output in outputs])

    yield "forward", forward
    if case.leaves:
        yield "forward and backward", both


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call, the mean of CALLS."""
    began = time.process_time()
    for _ in range(CALLS):
        work()
    return (time.process_time() - began) / CALLS


def row(case: Case, direction: str, work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """A row of the table, from `rounds` turns of both ways after one that warms up."""
    ways: dict[str, list[float]] = {"short": [], "dispatcher": []}
    for number in range(rounds + 1):
        for way, times in ways.items():
            with dispatched() if way == "dispatcher" else nullcontext():
                taken = seconds(work)
            times += [taken] if number else []
    ratios = [slow / fast for fast, slow in zip(*ways.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    short, dispatcher = (1e6 * statistics.median(times) for times in ways.values())
    return {
        "op": case.name,
        "direction": direction,
        "short us": round(short, 1),
        "dispatcher us": round(dispatcher, 1),
        "dispatcher / short": round(statistics.median(ratios), 2),
        "quartiles": f"{low:.2f} to {high:.2f}",
        "saved us": round(dispatcher - short, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=101, help="turns of both ways, at least 2 (default: 101)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/host"), help="folder of the table (default: %(default)s)"
    )
    own = parser.parse_args(argv)
    if own.rounds < 2:
        parser.error(f"--rounds {own.rounds}: at least 2, which quartiles need")
    torch.set_num_threads(1)
    results = Results(own.out, about(torch.device("cpu")))
    for case in cases():
        for direction, work in works(case):
            results.add("host", row(case, direction, work, own.rounds))
    text = markdown(results.rows["host"], COLUMNS)
    results.write("host.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

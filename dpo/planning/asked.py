"""What the plan command is asked beside the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

from dpo.common.errors import UserError
from dpo.training.flops import PEAK_BF16_TFLOPS, peak_tflops


@dataclass(frozen=True)
class Asked:
    memory: float | None = None  # GB of the card, as it is sold
    gpu: str | None = None  # a name in flops.PEAK_BF16_TFLOPS
    mfu: float = 0.3  # share of its peak, recomputed work included
    measured: str | None = None  # a run folder whose pairs/s are taken instead
    price: float | None = None  # of an hour of one GPU
    pairs: int | None = None  # of the data set
    draws: int = 4  # recorded reference errors of each pair
    processes: int = 1


def peak_of(gpu: str) -> float:
    """The dense bf16 peak of a GPU in TFLOP/s, by a part of its name. Raises UserError for one that is not known."""
    for name in (gpu, f"RTX {gpu}"):
        if (peak := peak_tflops(name)) is not None:
            return peak
    names = ", ".join(name for name, _ in PEAK_BF16_TFLOPS)
    raise UserError(f"--gpu {gpu}: its peak is not known; one of: {names}")

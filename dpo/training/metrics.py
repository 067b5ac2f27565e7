"""The figures of an optimizer step: accumulated on the device, read once per step.

Legend: B pairs of a micro-batch, N pairs of an optimizer step (all micro-batches, holes included), T timesteps, R rows
kept of each pair.

Every value kept is per pair, so the figures do not depend on how the step was cut into micro-batches, and the rows of
several processes may simply be concatenated along N before `summarise`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dpo.common import machine
from dpo.objective import PairTerms
from dpo.pages.figures import DECILES

ROWS = (
    "loss", "logit", "difference", "policy_win", "policy_lose", "reference_win", "reference_lose",
    "accuracy", "pull", "policy_size", "reference_size", "timestep", "prob", "usable",
)  # fmt: skip


class StepMetrics:
    """Per-pair rows of one optimizer step, on the device until `read`; timestep_count: T of the model's schedule."""

    def __init__(self, timestep_count: int) -> None:
        self.timestep_count = timestep_count
        self._rows: list[Tensor] = []

    def add(self, terms: PairTerms, prob: Tensor, usable: Tensor) -> None:
        """Keeps one micro-batch: prob and usable are [B]. Nothing here waits for the device."""
        values = (
            terms.loss, terms.logit, terms.difference, *terms.errors.unbind(0), terms.accuracy, terms.pull, *terms.sizes.unbind(0), terms.timesteps,
            prob, usable,
        )  # fmt: skip
        dtype = torch.promote_types(terms.loss.dtype, torch.float32)
        self._rows.append(torch.stack([value.detach().to(dtype) for value in values]))

    def take(self) -> Tensor:
        """The rows [R, N] of the step, in fp32 or wider, on the device; the accumulator is empty afterwards."""
        rows = torch.cat(self._rows, dim=1)
        self._rows = []
        return rows

    def put(self, rows: Tensor) -> None:
        """Keeps rows [R, N] that `take` gave, here or in several processes."""
        self._rows.append(rows)

    def read(
        self,
        scalars: Mapping[str, Tensor] | None = None,
        tables: Mapping[str, Tensor] | None = None,
        nominal: int | None = None,
    ) -> dict:
        """The step's figures, by one transfer to the host; empties the accumulator.

        scalars: device tensors of one element, such as the gradient
        norm, read in the same transfer; they keep their names. tables: vectors [T] (DDE's table, its correction),
        returned as their means `<name>_by_decile`. nominal: pairs of the step, where the rows have more holes than those
        of unusable pairs.
        """
        scalars, tables = scalars or {}, tables or {}
        rows = self.take()
        parts = [rows, *scalars.values(), *tables.values()]
        packed = torch.cat([part.detach().to(rows.device, rows.dtype).reshape(-1) for part in parts]).cpu()
        pieces = packed.split([part.numel() for part in parts])
        figures = summarise(pieces[0].reshape(rows.shape), self.timestep_count)
        if nominal is not None:
            figures["unusable_pairs"] = nominal - figures["pairs"]
        for name, piece in zip(scalars, pieces[1:]):
            figures[name] = _number(piece.item())
        for name, piece in zip(tables, pieces[1 + len(scalars) :]):
            figures[f"{name}_by_decile"] = table_by_decile(piece)
        return figures


def summarise(rows: Tensor, timestep_count: int) -> dict:
    """Rows [R, N] on the host -> plain numbers by name; holes (usable 0) count nowhere, ties in no share of pairs.

    Of images without a partner the liked ones are the win side and the others the lose side, whose number is then there.
    A figure without any pair, or one that is not finite (as without a reference), is None.
    """
    table = rows.double().numpy()
    row = dict(zip(ROWS, table[:, table[ROWS.index("usable")] > 0]))
    pairs = row["loss"].size
    margin, sided = row["logit"], row["prob"] != 0.5
    disliked = row["prob"] < 0.5  # images without a partner: each is on one side
    win, lose = ~disliked, disliked if disliked.any() else np.ones_like(disliked)
    decile = np.minimum(row["timestep"].astype(np.int64) * DECILES // timestep_count, DECILES - 1)
    quantiles = np.percentile(margin, (10, 50, 90)) if pairs and np.isfinite(margin).all() else (math.nan,) * 3
    return {
        "loss": _mean(row["loss"]),
        "implicit_accuracy": _mean(row["accuracy"][sided]),
        "margin_mean": _mean(margin),
        "margin_p10": _number(quantiles[0]),
        "margin_p50": _number(quantiles[1]),
        "margin_p90": _number(quantiles[2]),
        "gradient_factor": _mean(row["pull"][sided]),
        "prediction_norm_ratio": _ratio(row["policy_size"], row["reference_size"]),
        "win_error_vs_reference": _mean((row["policy_win"] - row["reference_win"])[win]),
        "lose_error_vs_reference": _mean((row["policy_lose"] - row["reference_lose"])[lose]),
        "policy_win_error": _mean(row["policy_win"][win]),
        "policy_lose_error": _mean(row["policy_lose"][lose]),
        "reference_win_error": _mean(row["reference_win"][win]),
        "reference_lose_error": _mean(row["reference_lose"][lose]),
        "difference_mean": _mean(row["difference"]),
        "pairs": pairs,
        "unusable_pairs": table.shape[1] - pairs,
        **({"disliked_images": int(disliked.sum())} if disliked.any() else {}),
        "nonfinite_timesteps": sorted({int(t) for t in row["timestep"][~np.isfinite(row["loss"])]}),
        "tied_pairs": int((row["prob"] == 0.5).sum()),
        "pairs_by_decile": [int((decile == index).sum()) for index in range(DECILES)],
        "accuracy_by_decile": [_mean(row["accuracy"][sided & (decile == index)]) for index in range(DECILES)],
        "margin_by_decile": [_mean(margin[decile == index]) for index in range(DECILES)],
    }


def table_by_decile(table: Tensor) -> list[float | None]:
    """Means of a vector [T] over DECILES equal stretches of the timesteps."""
    values = table.double().cpu().numpy()
    edges = [len(values) * index // DECILES for index in range(DECILES + 1)]
    return [_mean(values[low:high]) for low, high in itertools.pairwise(edges)]


def _ratio(values: np.ndarray, others: np.ndarray) -> float | None:
    """Mean over mean."""
    below = _mean(others)
    return _number(values.mean() / below) if below else None


def _mean(values: np.ndarray) -> float | None:
    return _number(values.mean()) if values.size else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return machine.peak_memory() / 2**30

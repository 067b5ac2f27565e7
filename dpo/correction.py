"""DDE's stepwise correction: the table M of delayed differences and the correction C(t) read from it.

    C(t) = sum over k = t+1 .. T-1 of lambda_k M[k]
    M[k] <- rho M[k] + (1 - rho) mean of d over this optimizer step's pairs with t = k     (no gradient)

This iteration's single forward pass feeds the next iterations' corrections: no extra model call ("delay update",
Shi et al., arXiv 2411.14871; the sign is reconstructed, see docs/method.md). M is read frozen during an optimizer step;
sums and counts gather over the whole effective batch, so the cut into micro-batches changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def correction(table: Tensor, precision: Tensor) -> Tensor:
    """C [T] from M [T] and lambda [T], in their dtype; C[T-1] is exactly 0."""
    terms = precision * table
    after = terms.flip(0).cumsum(0).flip(0)
    return torch.cat([after[1:], torch.zeros_like(after[:1])])


def updated(table: Tensor, sums: Tensor, counts: Tensor, rho: float) -> Tensor:
    """M [T] after one optimizer step: entries whose timestep was drawn move towards the step's mean of d.

    sums [T]: sum of d at each timestep; counts [T]: number of pairs there; rho in [0, 1]: share of the old value kept.
    """
    mean = sums / counts.clamp_min(1)
    return torch.where(counts > 0, rho * table + (1 - rho) * mean, table)


@dataclass
class CorrectionTable:
    """M, lambda, and the sums of the step in progress; all [T] float64 on the training device.

    M is part of a checkpoint.
    """

    table: Tensor
    precision: Tensor
    rho: float
    sums: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, precision: Tensor, rho: float) -> CorrectionTable:
        """M starts at 0: all importance ratios are 1."""
        blank = torch.zeros_like(precision)
        return cls(blank.clone(), precision, rho, blank.clone(), blank.clone())

    def correction(self) -> Tensor:
        """C [T] float64 from M as it was after the last optimizer step."""
        return correction(self.table, self.precision)

    def gather(self, sums: Tensor, counts: Tensor) -> None:
        """Add one micro-batch's sum of d and number of untied usable pairs per timestep ([T] each)."""
        self.sums += sums
        self.counts += counts

    def discard(self) -> None:
        """Forget the step in progress."""
        self.sums.zero_()
        self.counts.zero_()

    def commit(self) -> None:
        """End the optimizer step: one update of M from all that was gathered."""
        self.table.copy_(updated(self.table, self.sums, self.counts, self.rho))
        self.discard()

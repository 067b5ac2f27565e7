"""One layer's change as a product of two thin matrices: the best of each rank, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Change(NamedTuple):
    """The change D [m, n] of a weight, decomposed: D = sum of directions[:, i] rows[i], the largest first."""

    directions: Tensor  # [m, k] float64, orthonormal columns, over the shorter side
    rows: Tensor  # [k, n] float64, orthogonal
    energies: Tensor  # [k] float64: squared length of each row
    total: float  # squared length of D
    turned: bool  # whether the weight's columns are the shorter side, so that D is its transpose

    def rank_of(self, share: float) -> int:
        """The least rank that keeps `share` of the squared length."""
        kept = torch.cumsum(self.energies, 0) / self.total
        return min(int((kept < share).sum()) + 1, len(kept))

    def kept(self, rank: int) -> float:
        """The share of the squared length that the first `rank` keep."""
        return min(1.0, float(self.energies[:rank].sum()) / self.total)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """down [rank, in] and up [out, rank] of the weight's change, of the same size each, in float32."""
        size = self.energies[:rank].sqrt().sqrt()  # the root of a singular value
        up, down = self.directions[:, :rank] * size, self.rows[:rank] / size[:, None]
        up, down = (down.T, up.T) if self.turned else (up, down)
        return down.float().contiguous(), up.float().contiguous()


def decompose(change: Tensor) -> Change:
    """The singular value decomposition of a change [out, ...] (a convolution as [out, in * kh * kw]), not all 0.

    By the eigenvectors U of D D^T over the shorter side, and U^T D: exact as a projection whatever the eigenvalues'
    rounding, and several times faster than an SVD. Directions of no length to rounding are left out.
    """
    wide = change.flatten(1).double()
    turned = wide.shape[0] > wide.shape[1]
    wide = wide.T if turned else wide
    directions = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)
    rows = directions.T @ wide
    energies = rows.square().sum(1)
    order = torch.argsort(energies, descending=True)
    least = (torch.finfo(torch.float64).eps * max(wide.shape)) ** 2 * energies.max()
    order = order[energies[order] > least]
    total = float(wide.square().sum())
    return Change(directions[:, order], rows[order], energies[order], total, turned)


def rounding(weight: Tensor, dtype: torch.dtype) -> float:
    """The expected squared length of what rounding `weight` to `dtype` leaves: a twelfth of each step's square."""
    exponents = torch.frexp(weight.double()).exponent - 1
    info = torch.finfo(dtype)
    steps = (torch.exp2(exponents.double()) * info.eps).clamp_min(info.smallest_normal * info.eps)
    return float((steps.square() / 12 * (weight != 0)).sum())

"""DDE's stepwise correction: the table M of delayed differences and the correction C(t) read from it.

    C(t) = sum over k = t+1 .. T-1 of lambda_k M[k]
    A[k] <- rho A[k] + (1 - rho) mean of d over this optimizer step's pairs with t = k,  A[k] = 0 at first  (no gradient)
    M[k] = A[k] / (1 - rho^n),  n the number of steps that moved A[k]                    (0 while n = 0)

This iteration's single forward pass feeds the next iterations' corrections: no extra model call ("delay update",
Shi et al., arXiv 2411.14871; the sign is reconstructed, see docs/method.md). M is read frozen during an optimizer step;
sums and counts gather over the whole effective batch, so the cut into micro-batches changes nothing. Where a step has
fewer pairs than there are timesteps, neighbouring ones share an entry (`shared_entries`). Where noise levels depend on
the shape of an image, each shape has its own lambda and so its own C, and all shapes have one M (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

WIDEST = 50  # timesteps: an entry spans no more of the schedule


def correction(table: Tensor, precision: Tensor) -> Tensor:
    """C [..., T] from M [T] and lambda [..., T], in their dtype; C[T-1] is exactly 0."""
    terms = precision * table
    after = terms.flip(-1).cumsum(-1).flip(-1)
    return pad(after[..., 1:], (0, 1))


def updated(table: Tensor, sums: Tensor, counts: Tensor, rho: float) -> Tensor:
    """A [E] after one optimizer step: entries that were drawn move towards the step's mean of d.

    sums [E]: sum of d at each entry; counts [E]: number of pairs there; rho in [0, 1]: share of the old value kept.
    """
    mean = sums / counts.clamp_min(1)
    return torch.where(counts > 0, rho * table + (1 - rho) * mean, table)


def shared_entries(timesteps: Tensor, length: int, pairs: int) -> Tensor:
    """The entry of each timestep, [T] int64, for updates of `pairs` pairs; the number of entries where there is none.

    timesteps [K] int64, ascending: those that are drawn; the others have no entry. The schedule from the first of them
    to the last is cut into equal slices, so many that an entry is drawn about once an update, but none longer than
    WIDEST. With K pairs or more each timestep has its own; so have those of a few-step model, which are far apart.
    """
    first, span, count = int(timesteps[0]), int(timesteps[-1] - timesteps[0]) + 1, timesteps.numel()
    slices = min(span, max(-(-pairs * span // count), -(-span // WIDEST)))
    taken, dense = torch.unique_consecutive((timesteps - first) * slices // span, return_inverse=True)
    entries = torch.full((length,), taken.numel(), dtype=torch.int64)
    entries[timesteps] = dense
    return entries


def _members(entries: Tensor, count: int) -> Tensor:
    """The timesteps of each of `count` entries [E, W], filled up with T."""
    sizes = torch.bincount(entries, minlength=count + 1)[:count]
    members = torch.full((count, int(sizes.max())), entries.numel(), dtype=torch.int64, device=entries.device)
    places = torch.arange(members.shape[1], device=entries.device) < sizes[:, None]
    members[places] = entries.argsort(stable=True)[: int(sizes.sum())]
    return members


@dataclass
class CorrectionTable:
    """A, the entry of each timestep, lambda, and the sums of the step in progress, on the training device.

    `tensors` are part of a checkpoint. E entries; E of `entries` means none, and M is 0 there.
    """

    average: Tensor  # [E] float64
    start: Tensor | None  # [E] float64, the share of A that is still its start, 0: rho^n; None: M is A as it stands
    entries: Tensor  # [T] int64
    precision: Tensor  # [T] float64
    rho: float
    sums: Tensor = field(init=False)  # [T] float64
    counts: Tensor = field(init=False)  # [T] float64

    def __post_init__(self) -> None:
        self.sums, self.counts = torch.zeros_like(self.precision), torch.zeros_like(self.precision)
        self._members = _members(self.entries, self.average.numel())

    @classmethod
    def zeros(cls, precision: Tensor, rho: float, timesteps: Tensor, pairs: int) -> CorrectionTable:
        """M starts at 0: all importance ratios are 1. timesteps [K]: those drawn; pairs: of an update."""
        entries = shared_entries(timesteps.cpu().unique(), precision.numel(), pairs).to(precision.device)
        blank = precision.new_zeros(int(entries[timesteps].max()) + 1)
        return cls(blank, torch.ones_like(blank), entries, precision, rho)

    def size(self) -> tuple[int, int]:
        """The number of entries, and of the timesteps that have one."""
        count = self.average.numel()
        return count, int((self.entries < count).sum())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"correction": self.average} | (
            {} if self.start is None else {"start": self.start, "entries": self.entries}
        )

    def restored(self, tensors: Mapping[str, Tensor]) -> CorrectionTable:
        """The table of a checkpoint, with its entries, for the run that this one was made for.

        That of an earlier version has A alone: one entry a timestep, and nothing is divided.
        """
        there = {name: value.to(self.precision.device, copy=True) for name, value in tensors.items()}
        each = torch.arange(self.precision.numel(), device=self.precision.device)
        return CorrectionTable(
            there["correction"], there.get("start"), there.get("entries", each), self.precision, self.rho
        )

    @property
    def table(self) -> Tensor:
        """M [T] float64 as it was after the last optimizer step."""
        values = self.average
        if self.start is not None:
            values = torch.where(self.start < 1, values / (1 - self.start), 0.0)
        return pad(values, (0, 1))[self.entries]

    def correction(self, *others: Tensor) -> Tensor:
        """C [T] float64 from M as it was after the last optimizer step.

        others: lambda [T] of other noise levels, with which it is [1 + others, T], in their order.
        """
        return correction(self.table, torch.stack([self.precision, *others]) if others else self.precision)

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
        sums, counts = (pad(values, (0, 1))[self._members].sum(1) for values in (self.sums, self.counts))
        self.average.copy_(updated(self.average, sums, counts, self.rho))
        if self.start is not None:
            self.start.copy_(torch.where(counts > 0, self.rho * self.start, self.start))
        self.discard()

"""Held-out preference accuracy: the share of validation pairs that the policy ranks as people did.

For each pair, d is averaged over S keyed (timestep, noise) draws. The pair counts 1 when the mean is negative, one half
when it is 0. The reference errors do not change during a run: they are computed once, at its start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo.common.stats import share_interval
from dpo.data.batch import PairBatch
from dpo.encode import Encoder, Inputs
from dpo.models.family import Denoise
from dpo.objective import implicit_accuracy
from dpo.step import PairStep


@dataclass(frozen=True)
class HeldOut:
    """Encoded validation pairs on the CPU and their reference errors [S, 2, N], win and lose."""

    batches: list[Inputs]
    reference_errors: Tensor
    draws: int
    timesteps: Tensor  # [K] int64, the timesteps to draw from


@torch.no_grad()
def _errors(step: PairStep, batches: list[Inputs], draws: int) -> Tensor:
    """Errors [S, 2, N] (win, lose) of the policy in `step`, for S draws of N pairs, in fp32 or wider, on the device."""
    alone = replace(step, reference=None)
    zero = torch.zeros_like(step.weight)
    rows = []
    for draw in range(draws):
        found = []
        for batch in batches:
            x = batch.to(zero.device)
            errors = alone.errors(x._replace(draws=torch.full_like(x.draws, draw)), zero)[0].errors
            found.append(errors[:2])
        rows.append(torch.cat(found, dim=1))
    return torch.stack(rows)


def encode_held_out(
    step: PairStep, encoder: Encoder, batches: Iterable[PairBatch], draws: int, reference: Denoise | None
) -> HeldOut | None:
    """Encodes the held-out pairs and computes their reference errors in `draws` draws; None without a usable pair.

    Without a `reference` (sft, or recorded errors) the policy before its first update stands for it.
    """
    encoded = [encoder.inputs(batch).to("cpu") for batch in batches]
    if not encoded or not any(x.usable.any() for x in encoded):
        return None
    if reference is not None:
        step = replace(step, policy=reference)
    return HeldOut(encoded, _errors(step, encoded, draws), draws, step.path.timesteps)


def differences(step: PairStep, held_out: HeldOut) -> Tensor:
    """d [S, N] of the N labelled pairs (without ties and pairs that cannot be used) in each of S draws, on the CPU."""
    there = replace(step, path=replace(step.path, timesteps=held_out.timesteps))
    errors = _errors(there, held_out.batches, held_out.draws) - held_out.reference_errors
    return (errors[:, 0] - errors[:, 1]).cpu()[:, labelled(held_out)]


def labelled(held_out: HeldOut) -> Tensor:
    """Which of the held-out pairs [N] bool can be used and have a preferred image."""
    usable = torch.cat([x.usable for x in held_out.batches]).bool()
    return (usable & (torch.cat([x.prob for x in held_out.batches]) > 0.5)).cpu()


def drawn_timesteps(step: PairStep, held_out: HeldOut) -> Tensor:
    """The timestep [S, N] int64 of each draw of those pairs, on the CPU."""
    there = replace(step.path, timesteps=held_out.timesteps)
    keys = torch.cat([x.keys for x in held_out.batches])[labelled(held_out)].to(step.weight.device)
    rows = [there.draw(keys, torch.full_like(keys, draw), step.seed).cpu() for draw in range(held_out.draws)]
    return torch.stack(rows)


def accuracy(step: PairStep, held_out: HeldOut) -> dict[str, float | list[float]]:
    """Held-out preference accuracy with its 95 % Wilson interval, mean d, and the number of pairs (without ties)."""
    d = differences(step, held_out).mean(0)
    right = implicit_accuracy(d)
    count = len(d)
    low, high = share_interval(float(right.sum()), count)
    return {
        "heldout_accuracy": float(right.mean()) if count else 0.5,
        "heldout_interval": [low, high],
        "heldout_difference": float(d.mean()) if count else 0.0,
        "heldout_pairs": count,
    }

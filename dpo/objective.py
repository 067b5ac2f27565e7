"""The methods: from four per-sample errors to the loss of each pair, as pure functions.

Everything here is plain torch on tensors of any float dtype and device; in float64 it is the oracle of the kernels,
of the compiled paths and of the other precisions. To change an objective, change it here (and, for a new pairwise
shape, in csrc_triton/preference_loss.py, whose tests compare it with this file).

One loss, several credit assignments (docs/method.md; Diffusion-DPO: Wallace et al., arXiv 2311.12908, eq. 14;
DDE: Shi et al., arXiv 2411.14871; discounted: Yang et al., arXiv 2402.08265):

    d    = (Lw - Rw) - (Ll - Rl)                       training wants d < 0
    z    = -(beta/2) (weight(t) d + correction(t))
    loss = p f(z) + (1 - p) f(-z)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {
    "sigmoid": lambda z: -F.logsigmoid(z),
    "hinge": lambda z: F.relu(1 - z),
    "ipo": lambda z: (z - 0.5) ** 2,
}


@dataclass(frozen=True)
class Method:
    """How a method assigns credit over timesteps."""

    weight: str  # "uniform" | "discounted" | "single-shot"
    correction: bool  # whether the stepwise correction C(t) is added
    pairwise: bool = True  # False: supervised, no reference, no pair


METHODS = {
    "dpo": Method("uniform", correction=False),
    "discounted": Method("discounted", correction=False),
    "dde-single": Method("single-shot", correction=False),
    "dde-step": Method("uniform", correction=True),
    "dde": Method("single-shot", correction=True),
    "sft": Method("uniform", correction=False, pairwise=False),
}


class PairTerms(NamedTuple):
    """Per pair: loss, logit z, difference d [B]; errors [4, B] (policy win, lose, reference win, lose); accuracy [B]."""

    loss: Tensor
    logit: Tensor
    difference: Tensor
    errors: Tensor
    accuracy: Tensor


def sample_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over C, H, W: [N, C, H, W] twice -> [N], in at least float32.

    The mean, not the sum: the published betas belong to the mean.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)


def pair_difference(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """d [B] from predictions [2B, C, H, W] (wins, then losers), exactly 0 where policy equals reference.

    (p - y)^2 - (r - y)^2 = (p - r)(p + r - 2 y): the right side neither cancels nor rounds two large errors. The sums of
    win and lose may cancel each other, so they are taken in float64 and rounded once.
    """
    wide = torch.promote_types(policy.dtype, torch.float32)
    p, r, y = policy.to(wide), reference.to(wide), target.to(wide)
    win, lose = ((p - r) * (p + r - 2 * y)).flatten(1).mean(1, dtype=torch.float64).chunk(2)
    return (win - lose).to(wide)


def logits(d: Tensor, t: Tensor, weight: Tensor, correction: Tensor, beta: float | Tensor, prob: Tensor) -> Tensor:
    """z [B] = -(beta/2) (weight[t] d + correction[t]); ties (p = 0.5) do not receive the correction."""
    corrected = torch.where(prob > 0.5, correction[t].to(d.dtype), torch.zeros_like(d))
    return -(beta / 2) * (weight[t].to(d.dtype) * d + corrected)


def pair_terms(
    errors: Tensor,
    t: Tensor,
    prob: Tensor,
    weight: Tensor,
    correction: Tensor,
    beta: float | Tensor,
    shape: str = "sigmoid",
    *,
    sft_weight: float = 0.0,
    difference: Tensor | None = None,
) -> PairTerms:
    """Loss of each pair from its four errors.

    errors [4, B]: policy win, policy lose, reference win, reference lose; t [B] int64; prob [B] in [0.5, 1], the
    probability that "win" is preferred (1 hard label, 0.5 tie, 1 - s under label smoothing); weight, correction [T];
    `difference` [B] replaces (Lw - Rw) - (Ll - Rl) where it was accumulated without cancellation.
    """
    policy_win, policy_lose, reference_win, reference_lose = errors
    d = (policy_win - reference_win) - (policy_lose - reference_lose) if difference is None else difference
    z = logits(d, t, weight, correction, beta, prob)
    f = SHAPES[shape]
    loss = torch.lerp(f(-z), f(z), prob.to(z.dtype)) + sft_weight * policy_win  # p f(z) + (1 - p) f(-z), f(0) at z = 0
    return PairTerms(loss, z, d, errors, implicit_accuracy(d))


def implicit_accuracy(d: Tensor) -> Tensor:
    """1 where the policy moved towards the win image (d < 0), 0.5 where d == 0, else 0: d alone, no correction."""
    return (d < 0).to(d.dtype) + 0.5 * (d == 0).to(d.dtype)

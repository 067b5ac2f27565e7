"""The pairwise loss from predictions in plain torch, written apart from csrc_triton.

In float64 it is the oracle of kernels and other precisions. After the logit it runs the trainer's own code,
dpo.objective.pair_loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton.pair_errors import PairErrors
from dpo.objective import PairTerms, pair_loss


def sample_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over C, H, W: [N, C, H, W] twice -> [N], in at least float32."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)


def pair_difference(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """d [B] from predictions [2B, C, H, W] (wins, then losers), exactly 0 where policy equals reference.

    (p - y)^2 - (r - y)^2 = (p - r)(p + r - 2 y): the right side neither cancels nor rounds two large errors. The sums
    of win and lose may cancel each other, so they are taken in float64 and rounded once.
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
    shape: str | None = "sigmoid",
    *,
    sft_weight: float = 0.0,
    alpha: float | None = None,
    safeguard: float | None = None,
    product: Tensor | None = None,
    difference: Tensor | None = None,
) -> PairTerms:
    """The loss of each pair from its four errors [4, B]: policy win, policy lose, reference win, reference lose.

    t [B] int64; prob [B]; weight, correction [T]; `difference` [B] replaces (Lw - Rw) - (Ll - Rl) where it was taken
    without cancellation; `product` [B] is the mean of the two residuals' product.
    """
    policy_win, policy_lose, reference_win, reference_lose = errors
    d = (policy_win - reference_win) - (policy_lose - reference_lose) if difference is None else difference
    nothing, gain = torch.zeros_like(weight), -(beta / 2) * weight[t].to(d.dtype)
    found = PairErrors(
        logits(d, t, weight, correction, beta, prob),
        d,
        errors,
        nothing,
        nothing,
        gain,
        torch.zeros_like(d) if product is None else product,
    )
    return pair_loss(
        found, prob, torch.ones_like(d), t, shape=shape, sft_weight=sft_weight, alpha=alpha, safeguard=safeguard
    )


def terms_of(
    function,
    policy,
    timesteps,
    prob,
    usable,
    weight,
    correction,
    beta,
    *,
    shape,
    sft_weight=0.0,
    safeguard=None,
    **keywords,
) -> PairTerms:
    """What training computes: the fused op (`function`: pair_errors or its plain form), then the objective.

    Without a reference the objective is the supervised one.
    """
    found = function(policy, timesteps, prob, usable, weight, correction, beta, **keywords)
    supervised = keywords.get("reference") is None and keywords.get("recorded") is None
    return pair_loss(
        found, prob, usable, timesteps, shape=None if supervised else shape, sft_weight=sft_weight, safeguard=safeguard
    )

"""How much of a preference is credited to each timestep: weight and stepwise factor lambda by method, [T] float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo.methods import METHODS
from dpo.schedule import NO_SIGNAL, Schedule


class Tables(NamedTuple):
    """weight [T] and lambda [T] in float64; lambda is all zero for a method without the stepwise correction."""

    weight: Tensor
    precision: Tensor


def tables(
    method: str,
    schedule: Schedule,
    *,
    gamma: float = 0.99475,
    cap: float = 250.0,
    sigma2: str = "beta",
    kappa: float = 1.0,
) -> Tables:
    """The weight and lambda of `method` for a model's schedule.

    gamma: discount per timestep; cap: upper bound of the single-shot weight; sigma2: "beta" or "posterior", see
    `step_precision`; kappa: factor of lambda, and so of the correction C.
    """
    spec = METHODS[method]
    weights = {
        "uniform": lambda: torch.ones(schedule.length, dtype=torch.float64),
        "discounted": lambda: discounted_weight(schedule, gamma),
        "single-shot": lambda: single_shot_weight(schedule, cap),
    }
    precision = kappa * step_precision(schedule, sigma2)
    return Tables(weights[spec.weight](), precision if spec.correction else torch.zeros_like(precision))


def single_shot_weight(schedule: Schedule, cap: float = 250.0) -> Tensor:
    """DDE's single-shot weight [T] in float64, at most `cap` (Shi et al., arXiv 2411.14871; docs/method.md).

    (1 - abar) / abar on the epsilon error, 1 - abar on the v error.
    """
    abar = schedule.alphas_cumprod
    if schedule.velocity:
        return (1 - abar).clamp(max=cap)
    return ((1 - abar) / abar.clamp_min(1e-300)).clamp(max=cap)


def discounted_weight(schedule: Schedule, gamma: float) -> Tensor:
    """gamma^(T-1-t) [T]: more credit to the first denoising steps (Yang et al., arXiv 2402.08265)."""
    t = torch.arange(schedule.length, dtype=torch.float64)
    return gamma ** (schedule.length - 1 - t)


def step_precision(schedule: Schedule, sigma2: str = "beta") -> Tensor:
    """lambda_k [T]: the factor of -(1/2)|error|^2 in the log importance ratio of step k (docs/method.md).

    lambda_k = beta_k^2 / (sigma_k^2 alpha_k (1 - abar_k)), with sigma_k^2 = beta_k ("beta") or the posterior variance
    beta_k (1 - abar_{k-1}) / (1 - abar_k) ("posterior"); times abar_k on the v error. Where abar_k = 0 it is 0 on the
    epsilon error, which is never trained on there, and on the v error the limit: beta_k abar_{k-1} / (1 - abar_k) for
    sigma_k^2 = beta_k. Zero outside the chain and, for the posterior variance, at the chain's first member (it has
    variance 0 and is never skipped). Raises ValueError for another `sigma2`.
    """
    t = schedule.timesteps()
    abar = schedule.alphas_cumprod[t]
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    alpha = abar / before
    beta = 1 - alpha
    lam, limit = beta / (alpha * (1 - abar)), beta * before / (1 - abar)  # abar_k = alpha_k abar_{k-1}
    if sigma2 == "posterior":
        lam, limit = (x * (1 - abar) / (1 - before) for x in (lam, limit))
        lam[0] = 0.0
    elif sigma2 != "beta":
        raise ValueError(f"sigma2 is 'beta' or 'posterior', not {sigma2!r}")
    if schedule.velocity:
        lam = lam * abar
    else:
        limit = torch.zeros_like(lam)
    table = torch.zeros(schedule.length, dtype=torch.float64)
    table[t] = torch.where(abar > NO_SIGNAL, lam, limit)
    return table

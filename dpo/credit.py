"""How much of a preference is credited to each timestep: weight and stepwise factor lambda by method, [T] float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo.methods import METHODS
from dpo.schedule import NO_SIGNAL, FlowSchedule, Plan


class Tables(NamedTuple):
    """weight [T] and lambda [T] in float64; lambda is all zero for a method without the stepwise correction."""

    weight: Tensor
    precision: Tensor


def tables(
    method: str,
    schedule: Plan,
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


def single_shot_weight(schedule: Plan, cap: float = 250.0) -> Tensor:
    """DDE's single-shot weight [T] in float64, at most `cap` (Shi et al., arXiv 2411.14871; docs/method.md).

    (1 - abar) / abar on the epsilon error, 1 - abar on the v error; s^2 on the error of a flow, where
    x_0 = x_s - s v.
    """
    if isinstance(schedule, FlowSchedule):
        return schedule.levels.square().clamp(max=cap)
    abar = schedule.alphas_cumprod
    if schedule.velocity:
        return (1 - abar).clamp(max=cap)
    return ((1 - abar) / abar.clamp_min(1e-300)).clamp(max=cap)


def discounted_weight(schedule: Plan, gamma: float) -> Tensor:
    """gamma^(T-1-t) [T]: more credit to the first denoising steps (Yang et al., arXiv 2402.08265)."""
    t = torch.arange(schedule.length, dtype=torch.float64)
    return gamma ** (schedule.length - 1 - t)


def step_precision(schedule: Plan, sigma2: str = "beta") -> Tensor:
    """lambda_k [T]: the factor of -(1/2)|error|^2 in the log importance ratio of step k (docs/method.md).

    lambda_k = beta_k^2 / (sigma_k^2 alpha_k (1 - abar_k)), with sigma_k^2 = beta_k ("beta") or the posterior variance
    beta_k (1 - abar_{k-1}) / (1 - abar_k) ("posterior"); times abar_k on the v error. Where abar_k = 0 it is 0 on the
    epsilon error, which is never trained on there, and on the v error the limit: beta_k abar_{k-1} / (1 - abar_k) for
    sigma_k^2 = beta_k. Zero outside the chain and, for the posterior variance, at the chain's first member (it has
    variance 0 and is never skipped). Raises ValueError for another `sigma2`. Of a flow: `flow_precision`.
    """
    if sigma2 not in ("beta", "posterior"):
        raise ValueError(f"sigma2 is 'beta' or 'posterior', not {sigma2!r}")
    if isinstance(schedule, FlowSchedule):
        return flow_precision(schedule, sigma2)
    t = schedule.timesteps()
    abar = schedule.alphas_cumprod[t]
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    alpha = abar / before
    beta = 1 - alpha
    lam, limit = beta / (alpha * (1 - abar)), beta * before / (1 - abar)  # abar_k = alpha_k abar_{k-1}
    if sigma2 == "posterior":
        lam, limit = (x * (1 - abar) / (1 - before) for x in (lam, limit))
        lam[0] = 0.0
    if schedule.velocity:
        lam = lam * abar
    else:
        limit = torch.zeros_like(lam)
    table = torch.zeros(schedule.length, dtype=torch.float64)
    table[t] = torch.where(abar > NO_SIGNAL, lam, limit)
    return table


def flow_precision(schedule: FlowSchedule, sigma2: str) -> Tensor:
    """lambda_k [T] on the v error of rectified flow; derived in docs/method.md.

    With a = 1 - s and c_k = s_k^2 - (a_k / a_{k-1})^2 s_{k-1}^2 the posterior of step k has variance
    c_k s_{k-1}^2 / s_k^2 and mean slope a_{k-1} c_k / s_k^2 in x_0, and x_0 is off by s_k times the v error. So lambda_k =
    a_{k-1}^2 c_k / s_k^2 for sigma_k^2 = c_k ("beta"), a_{k-1}^2 c_k / s_{k-1}^2 for the posterior variance. Zero
    outside the chain and at its first member, which nothing lies below.
    """
    t = schedule.timesteps()
    s = schedule.levels[t]
    before = torch.cat([torch.zeros(1, dtype=s.dtype), s[:-1]])
    a, a_before = 1 - s, 1 - before
    c = s.square() - (a / a_before * before).square()
    lam = a_before.square() * c / (s if sigma2 == "beta" else before).square()
    lam[0] = 0.0
    table = torch.zeros(schedule.length, dtype=torch.float64)
    table[t] = lam
    return table

"""The noise schedule of a model and the per-timestep tables that the methods need, all [T] in float64.

Notation: T = 1000 training timesteps, t in {0..T-1} indexes `alphas_cumprod` (abar_t). A model that was distilled to a
few timesteps (SDXL-Turbo) trains on that sub-chain: alpha, beta and lambda are then taken between its consecutive
members. Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), DDE (Shi et al., arXiv 2411.14871), docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo.errors import UserError

TURBO_TIMESTEPS = (249, 499, 749, 999)


@dataclass(frozen=True)
class Schedule:
    """What the model was trained with: `alphas_cumprod` [T] float64, its prediction type, and the timesteps it knows."""

    alphas_cumprod: Tensor  # [T] float64
    prediction_type: str  # "epsilon" | "v_prediction"
    chain: tuple[int, ...] | None = None  # ascending timesteps of a few-step model; None = all of 0..T-1

    @property
    def length(self) -> int:
        return self.alphas_cumprod.numel()

    def timesteps(self) -> Tensor:
        """The chain's timesteps, ascending [K] int64."""
        return torch.arange(self.length) if self.chain is None else torch.tensor(self.chain)


def from_scheduler(
    config: Mapping, *, prediction_type: str = "auto", turbo: bool = False, zero_snr: bool | None = None
) -> Schedule:
    """Read a diffusers scheduler config. Prediction type and noise schedule come from the model, never assumed.

    `turbo` confines the chain to SDXL-Turbo's four timesteps and, unless `zero_snr` says otherwise, rescales the
    schedule to zero terminal SNR (Lin et al. 2023), as the model was distilled. Raises UserError for an unknown
    prediction type.
    """
    from diffusers import DDPMScheduler

    rescale = bool(config.get("rescale_betas_zero_snr", False)) or turbo if zero_snr is None else zero_snr
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    known = {key: config[key] for key in keys if config.get(key) is not None}
    scheduler = DDPMScheduler(**known, rescale_betas_zero_snr=rescale)
    kind = config.get("prediction_type", "epsilon") if prediction_type == "auto" else prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the model's scheduler predicts {kind!r}; this trainer knows epsilon and v_prediction")
    return Schedule(scheduler.alphas_cumprod.double(), kind, TURBO_TIMESTEPS if turbo else None)


def usable_timesteps(schedule: Schedule, low: int = 0, high: int | None = None) -> Tensor:
    """Timesteps to draw from: the chain inside [low, high) without dead ones, ascending [K] int64.

    At abar_t = 0 both halves of a pair see the same pure noise, so with shared noise the logit is identically 0
    and the sample would be wasted (Turbo's t = 999). Raises UserError when nothing is left.
    """
    high = schedule.length if high is None else high
    t = schedule.timesteps()
    inside = t[(t >= low) & (t < high)]
    alive = inside[schedule.alphas_cumprod[inside] > 1e-12]
    if alive.numel() == 0:
        raise UserError(f"no usable timestep in the window [{low}, {high}); widen --window-low / --window-high")
    return alive


def single_shot_weight(schedule: Schedule, cap: float = 250.0) -> Tensor:
    """DDE's single-shot weight [T]: (1 - abar) / abar on the epsilon error, (1 - abar) on the v error, at most `cap`."""
    abar = schedule.alphas_cumprod
    if schedule.prediction_type == "v_prediction":
        return (1 - abar).clamp(max=cap)
    return ((1 - abar) / abar.clamp_min(1e-300)).clamp(max=cap)


def discounted_weight(schedule: Schedule, gamma: float) -> Tensor:
    """gamma^(T-1-t) [T]: more credit to the first denoising steps (Yang et al., arXiv 2402.08265)."""
    t = torch.arange(schedule.length, dtype=torch.float64)
    return gamma ** (schedule.length - 1 - t)


def step_precision(schedule: Schedule, sigma2: str = "beta") -> Tensor:
    """lambda_k [T]: the factor of -(1/2)|error|^2 in the log importance ratio of step k (docs/method.md).

    lambda_k = beta_k^2 / (sigma_k^2 alpha_k (1 - abar_k)), with sigma_k^2 = beta_k ("beta") or the posterior variance
    beta_k (1 - abar_{k-1}) / (1 - abar_k) ("posterior"); times abar_k on the v error. Zero outside the chain, where
    abar_k = 0, and, for the posterior variance, at the chain's first member (it has variance 0 and is never skipped).
    """
    t = schedule.timesteps()
    abar = schedule.alphas_cumprod[t]
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    alpha = abar / before
    beta = 1 - alpha
    lam = beta / (alpha * (1 - abar))
    if sigma2 == "posterior":
        lam = lam * (1 - abar) / (1 - before)
        lam[0] = 0.0
    elif sigma2 != "beta":
        raise ValueError(f"sigma2 is 'beta' or 'posterior', not {sigma2!r}")
    if schedule.prediction_type == "v_prediction":
        lam = lam * abar
    table = torch.zeros(schedule.length, dtype=torch.float64)
    table[t] = torch.where(abar > 1e-12, lam, torch.zeros_like(lam))
    return table

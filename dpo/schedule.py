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

from dpo.common.errors import UserError

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

"""The noise schedule of a model, and the path from data to noise that follows from it.

Notation: T = 1000 training timesteps, t in {0..T-1} indexes `alphas_cumprod` (abar_t). A model that was distilled to a
few timesteps (SDXL-Turbo) trains on that sub-chain: its alpha and beta are those between consecutive members
(credit.py). Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), docs/method.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csrc_triton.timesteps import draw_timesteps
from dpo.common.errors import UserError
from dpo.common.words import SHOWN, excerpt, first_line

TURBO_TIMESTEPS = (249, 499, 749, 999)
NO_SIGNAL = 1e-12  # abar at or below it is 0


@dataclass(frozen=True)
class Schedule:
    """The noise schedule that a model was trained with, what the model predicts, and the timesteps that it knows."""

    alphas_cumprod: Tensor  # [T] float64
    prediction_type: str  # "epsilon" | "v_prediction"
    chain: tuple[int, ...] | None = None  # ascending timesteps of a few-step model; None = all of 0..T-1

    @property
    def length(self) -> int:
        return self.alphas_cumprod.numel()

    @property
    def velocity(self) -> bool:
        """Whether the target is v, a mixture of noise and data, and not the noise itself."""
        return self.prediction_type == "v_prediction"

    def timesteps(self) -> Tensor:
        """The chain's timesteps, ascending [K] int64."""
        return torch.arange(self.length) if self.chain is None else torch.tensor(self.chain)


@dataclass(frozen=True)
class NoisePath:
    """The path from data to noise, on the training device: four tables by timestep, and the timesteps to draw from.

        x_t    = signal(t) x_0 + spread(t) eps
        target = of_noise(t) eps + of_data(t) x_0

    (of_noise, of_data) is (1, 0) for epsilon prediction, (signal, -spread) for v-prediction (Salimans and Ho 2022,
    appendix D) and (1, -1) for rectified flow.
    """

    signal: Tensor  # [T]
    spread: Tensor  # [T]
    of_noise: Tensor  # [T]
    of_data: Tensor  # [T]
    timesteps: Tensor  # [K] int64, the timesteps to draw from
    needs_data: bool  # whether of_data is not 0; where it is 0 the target is made without x_0

    def draw(self, keys: Tensor, draws: Tensor, seed: Tensor) -> Tensor:
        """t [B] int64, uniform over `timesteps`: a function of seed (0-d), pair keys [B] and draws [B], all int64."""
        return draw_timesteps(self.timesteps, keys, draws, seed)


def noise_path(
    schedule: Schedule, timesteps: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> NoisePath:
    """The path of a diffusion schedule in `dtype` (fp32 or float64) on `device`; timesteps [K]: those to draw from.

    Square roots are taken in float64 and rounded once, so that every device has the same table.
    """
    abar = schedule.alphas_cumprod.to(dtype)
    signal, spread = (x.double().sqrt().to(dtype) for x in (abar, 1 - abar))
    of_noise, of_data = (signal, -spread) if schedule.velocity else (torch.ones_like(signal), torch.zeros_like(signal))
    return NoisePath(
        signal=signal.to(device),
        spread=spread.to(device),
        of_noise=of_noise.to(device),
        of_data=of_data.to(device),
        timesteps=timesteps.to(device),
        needs_data=schedule.velocity,
    )


LONGEST = 1000  # timesteps, as the settings of the window have it
BETAS = ("beta_start", "beta_end", "beta_schedule")
OTHER_SCHEDULES = ("use_flow_sigmas", "snr_shift_scale")  # settings under which the betas are not all of the schedule


def complete(config: Mapping, about: str = "") -> tuple[dict[str, Any], list[str]]:
    """A diffusers scheduler config with what the training depends on said, and lines for the log on what it left out.

    A missing key means what the class that the config names declares: published configs rely on that for
    prediction_type. `about`, the model's name, begins the messages. Betas must be said.
    Raises UserError for them, for a class that diffusers does not have, and for a schedule that is not one of betas
    (EDM, flow matching), where noise is added otherwise than here.
    """
    import diffusers

    name, known = config.get("_class_name"), dict(config)
    if name is not None and not isinstance(name, str):
        raise UserError(
            f"{about}the model's scheduler needs the name of a class, found {excerpt(name)}; mend scheduler_config.json"
        )
    if name is None:
        known.pop("_class_name", None)  # null is what diffusers refuses
    missing = [key for key in ("num_train_timesteps", "prediction_type") if config.get(key) is None]
    found = getattr(diffusers, name, None) if name is not None and name.isidentifier() else None
    cls: Any = found if isinstance(found, type) else None  # a module of diffusers has a name too
    if cls is None and (name is not None or missing):
        unknown = "" if name is None else f"is of a class that diffusers does not have ({name[:SHOWN]})"
        raise UserError(
            f"{about}the model's scheduler {unknown or f'says no {missing[0]} and no class'}: its noise schedule is "
            "unknown; mend scheduler_config.json"
        )
    if backends := getattr(cls, "_backends", None):  # diffusers' stand-in for a class whose libraries are not installed
        raise UserError(f"{about}the model's scheduler {name} needs {' and '.join(backends)}: install them")
    declared = inspect.signature(cls.__init__).parameters if cls is not None else {}
    other = next((key for key in OTHER_SCHEDULES if config.get(key)), None)
    if config.get("timestep_type") == "continuous":
        other = "timestep_type continuous"
    if (cls is not None and "beta_schedule" not in declared) or other:
        raise UserError(
            f"{about}the model's scheduler {name}{f' ({other})' if other else ''} adds noise by no schedule of betas, as EDM and "
            "flow matching do: this trainer knows models trained with betas (DDPM)"
        )
    absent = [key for key in BETAS if config.get(key) is None]
    if absent and config.get("trained_betas") is None:
        raise UserError(
            f"{about}the model's scheduler says no {absent[0]}: mend scheduler_config.json, a schedule is not guessed"
        )
    known |= {key: declared[key].default for key in missing}
    length = known["num_train_timesteps"]
    if type(length) is not int or not 1 <= length <= LONGEST:
        raise UserError(
            f"{about}the model's scheduler says num_train_timesteps {excerpt(length)}: this trainer knows 1 to {LONGEST}"
        )
    return known, [f"the model's scheduler says no {key}: {known[key]}, the default of {name}" for key in missing]


def from_scheduler(
    config: Mapping, *, prediction_type: str = "auto", turbo: bool = False, zero_snr: bool | None = None
) -> Schedule:
    """Read a diffusers scheduler config. Prediction type and noise schedule come from the model, never assumed.

    `turbo` confines the chain to SDXL-Turbo's four timesteps and, unless `zero_snr` says otherwise, rescales the
    schedule to zero terminal SNR (Lin et al. 2023), as the model was distilled. Raises UserError for an unknown
    prediction type and for what `complete` refuses.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    config, _ = complete(config)
    rescale = bool(config.get("rescale_betas_zero_snr", False)) or turbo if zero_snr is None else zero_snr
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    known = {key: config[key] for key in keys if config.get(key) is not None}
    try:
        abar = DDPMScheduler(**known, rescale_betas_zero_snr=rescale).alphas_cumprod.double()
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the model's scheduler has betas that cannot be made ({first_line(error)}): {known}"
        ) from error
    if abar.numel() != known["num_train_timesteps"]:
        raise UserError(
            f"the model's scheduler has {abar.numel()} trained_betas for num_train_timesteps {known['num_train_timesteps']}"
        )
    if not ((abar >= 0) & (abar <= 1)).all() or (abar.diff() > 0).any():  # NaN is not either
        raise UserError(f"the model's scheduler has betas that are not between 0 and 1: {known}")
    kind = config["prediction_type"] if prediction_type == "auto" else prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"the model's scheduler predicts {kind!r}; this trainer knows epsilon and v_prediction")
    return Schedule(abar, kind, TURBO_TIMESTEPS if turbo else None)


def usable_timesteps(schedule: Schedule, low: int = 0, high: int | None = None) -> Tensor:
    """Timesteps to draw from: the chain inside [low, high) without dead ones, ascending [K] int64.

    At abar_t = 0 both halves of a pair see the same pure noise. Where the noise is also the target, their errors are the
    same, the logit is 0 and the sample would be wasted (SDXL-Turbo's t = 999). The v target there is -x_0, which
    differs: those timesteps stay. Raises UserError when nothing is left.
    """
    high = schedule.length if high is None else high
    t = schedule.timesteps()
    inside = t[(t >= low) & (t < high)]
    alive = inside if schedule.velocity else inside[schedule.alphas_cumprod[inside] > NO_SIGNAL]
    if alive.numel() == 0:
        raise UserError(f"no usable timestep in the window [{low}, {high}); widen --window-low / --window-high")
    return alive

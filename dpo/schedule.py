"""The noise schedule of a model, and the path from data to noise that follows from it.

Notation: T = 1000 training timesteps, t in {0..T-1} indexes `alphas_cumprod` (abar_t). A model that was distilled to a
few timesteps (SDXL-Turbo) trains on that sub-chain: its alpha and beta are those between consecutive members
(credit.py). A model of rectified flow has noise levels s in (0, 1] in the place of abar; t is the place in their grid.
Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), rectified flow (Liu et al. 2023; Esser et al. 2024),
docs/method.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from csrc_triton.timesteps import draw_timesteps
from dpo.common.errors import UserError
from dpo.common.words import SHOWN, excerpt, first_line

TURBO_TIMESTEPS = (249, 499, 749, 999)
NO_SIGNAL = 1e-12  # abar at or below it is 0
FLOW = "flow_prediction"  # diffusers' name for a target of rectified flow
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"


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

    def content(self) -> Tensor:
        """The numbers that it consists of, in float64: equal for equal schedules."""
        return self.alphas_cumprod


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels of a model of rectified flow: x_t = (1 - s) x_0 + s eps with s = levels[t], target eps - x_0."""

    levels: Tensor  # [T] float64, ascending in (0, 1]: the training grid k / T, shifted as the model's scheduler says
    chain: tuple[int, ...] | None = None  # ascending timesteps of a few-step model; None = all of 0..T-1
    prediction_type: str = FLOW
    velocity: bool = True  # the target is a mixture of noise and data at every level

    @property
    def length(self) -> int:
        return self.levels.numel()

    def timesteps(self) -> Tensor:
        """The chain's timesteps, ascending [K] int64."""
        return torch.arange(self.length) if self.chain is None else torch.tensor(self.chain)

    def content(self) -> Tensor:
        """The numbers that it consists of, in float64: equal for equal schedules."""
        return self.levels


Plan: TypeAlias = Schedule | FlowSchedule


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
    timesteps: (
        Tensor  # [K] int64, the timesteps to draw from; one that is drawn more often than others stands more often
    )
    needs_data: bool  # whether of_data is not 0; where it is 0 the target is made without x_0
    times: Tensor | None = None  # [T] what the denoiser is told in the place of t; None: t itself

    def draw(self, keys: Tensor, draws: Tensor, seed: Tensor) -> Tensor:
        """t [B] int64, uniform over `timesteps`: a function of seed (0-d), pair keys [B] and draws [B], all int64."""
        return draw_timesteps(self.timesteps, keys, draws, seed)

    def told(self, t: Tensor) -> Tensor:
        """What the denoiser is told of timesteps t [B] int64: t, or of a flow 1000 s, as diffusers' schedulers have it."""
        return t if self.times is None else self.times[t]


def noise_path(schedule: Plan, timesteps: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> NoisePath:
    """The path of a schedule in `dtype` (fp32 or float64) on `device`; timesteps [K]: those to draw from.

    Square roots are taken in float64 and rounded once, so that every device has the same table.
    """
    if isinstance(schedule, FlowSchedule):
        levels = schedule.levels
        tables = (1 - levels, levels, torch.ones_like(levels), -torch.ones_like(levels), 1000 * levels)
        signal, spread, of_noise, of_data, times = (table.to(device, dtype) for table in tables)
        return NoisePath(signal, spread, of_noise, of_data, timesteps.to(device), needs_data=True, times=times)
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
            f"{about}the model's scheduler {name}{f' ({other})' if other else ''} adds noise by no schedule of betas: this "
            f"trainer knows models trained with betas (DDPM), and for families of flow matching {FLOW_CLASS}"
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


def usable_timesteps(schedule: Plan, low: int = 0, high: int | None = None) -> Tensor:
    """Timesteps to draw from: the chain inside [low, high) without dead ones, ascending [K] int64.

    At abar_t = 0 both halves of a pair see the same pure noise. Where the noise is also the target, their errors are the
    same, the logit is 0 and the sample would be wasted (SDXL-Turbo's t = 999). The v target there is -x_0, which
    differs: those timesteps stay, as do all of a flow. Raises UserError when nothing is left.
    """
    high = schedule.length if high is None else high
    t = schedule.timesteps()
    inside = t[(t >= low) & (t < high)]
    alive = inside
    if isinstance(schedule, Schedule) and not schedule.velocity:
        alive = inside[schedule.alphas_cumprod[inside] > NO_SIGNAL]
    if alive.numel() == 0:
        raise UserError(f"no usable timestep in the window [{low}, {high}); widen --window-low / --window-high")
    return alive


# ---- rectified flow

FLOW_KEYS = ("num_train_timesteps", "shift", "use_dynamic_shifting")
DYNAMIC_KEYS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
SHIFTS = ("exponential", "linear")  # of a dynamic shift, by its mu


def complete_flow(config: Mapping, about: str = "") -> tuple[dict[str, Any], list[str]]:
    """`complete` for a family of flow matching: its scheduler's config with what the training depends on said.

    What a file leaves out is what diffusers' class declares, as published files rely on, and the lines for the log say
    so. Raises UserError for another class, and for a grid that is not the plain one of k / T and a shift.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    name = config.get("_class_name")
    if name != FLOW_CLASS:
        raise UserError(
            f"{about}the model's scheduler is {excerpt(name)}: a model of flow matching is trained with {FLOW_CLASS}; mend "
            "scheduler_config.json"
        )
    if config.get("invert_sigmas"):
        raise UserError(
            f"{about}the model's scheduler has invert_sigmas: this trainer knows noise levels that rise with t"
        )
    declared = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    wanted = [*FLOW_KEYS, *(("time_shift_type", *DYNAMIC_KEYS) if config.get("use_dynamic_shifting") else ())]
    missing = [key for key in wanted if config.get(key) is None]
    known = dict(config) | {key: declared[key].default for key in missing}
    length, _shift = known["num_train_timesteps"], known["shift"]
    if type(length) is not int or not 1 <= length <= LONGEST:
        raise UserError(
            f"{about}the model's scheduler says num_train_timesteps {excerpt(length)}: this trainer knows 1 to {LONGEST}"
        )
    numbers = {key: known[key] for key in ("shift", *DYNAMIC_KEYS) if key in wanted}
    if wrong := next((key for key, x in numbers.items() if type(x) not in (int, float) or not x > 0), None):
        raise UserError(
            f"{about}the model's scheduler says {wrong} {excerpt(known[wrong])}: a number above 0 is expected"
        )
    if known["use_dynamic_shifting"] and known["max_image_seq_len"] <= known["base_image_seq_len"]:
        raise UserError(
            f"{about}the model's scheduler says max_image_seq_len {known['max_image_seq_len']}: it is not above its base_image_seq_len"
        )
    if known["use_dynamic_shifting"] and known["time_shift_type"] not in SHIFTS:
        raise UserError(
            f"{about}the model's scheduler says time_shift_type {excerpt(known['time_shift_type'])}: this trainer knows "
            f"{' and '.join(SHIFTS)}"
        )
    return known, [f"the model's scheduler says no {key}: {known[key]}, the default of {name}" for key in missing]


def shift_by_tokens(config: Mapping, tokens: int) -> float:
    """mu of a dynamic shift for an image of so many tokens: linear between the two points that the scheduler says."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(config["base_shift"] + slope * (tokens - low))


def flow_from_scheduler(
    config: Mapping, *, mu: float | None = None, steps: Sequence[float] | None = None
) -> FlowSchedule:
    """The training grid of a scheduler's config, as `complete_flow` made it.

    The levels k / T, k = 1..T, shifted: by m = shift as s' = m s / (1 + (m - 1) s), or dynamically by `mu`, which is
    m = e^mu ("exponential") or m = mu ("linear") in the same formula (Esser et al. 2024, eq. 23). What a scheduler does
    to its sampling steps alone, as shift_terminal, is no part of the grid. steps: the levels that a distilled model is
    sampled at, whose nearest members of the grid are the chain.
    """
    length = config["num_train_timesteps"]
    s = torch.arange(1, length + 1, dtype=torch.float64) / length
    factor = float(config["shift"])
    if config["use_dynamic_shifting"]:
        assert mu is not None, "of the family and the number of tokens"
        factor = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    if not factor > 0:
        raise UserError(
            f"the model's scheduler shifts the noise levels of this size by {factor:.3g}: a number above 0 is expected"
        )
    levels = factor * s / (1 + (factor - 1) * s)
    nearest = [int((levels - step).abs().argmin()) for step in steps or ()]
    return FlowSchedule(levels, tuple(sorted(set(nearest))) or None)


GRID, UNIFORM, LOGIT_NORMAL = "grid", "uniform", "logit-normal"
QUANTILES = 1 << 18


@dataclass(frozen=True)
class Draw:
    """How the noise level of a flow is drawn: any member of the grid alike, s uniform, or logit(s) normal."""

    kind: str = GRID
    mean: float = 0.0  # of logit(s)
    sd: float = 1.0


def to_draw(schedule: Plan, low: int, high: int | None, draw: Draw) -> Tensor:
    """The timesteps to draw from uniformly, ascending [K] int64, so that the levels inside [low, high) follow `draw`.

    Without "grid" it is a list of the levels next to QUANTILES quantiles of the distribution, so a timestep stands in
    it as often as it is likely. Raises UserError when nothing is left.
    """
    usable = usable_timesteps(schedule, low, high)
    if draw.kind == GRID:
        return usable
    assert isinstance(schedule, FlowSchedule), "of diffusion every timestep is as likely"
    s = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    if draw.kind == LOGIT_NORMAL:
        s = torch.sigmoid(draw.mean + draw.sd * torch.special.ndtri(s))
    levels = schedule.levels[schedule.timesteps()]
    between = (levels[1:] + levels[:-1]) / 2
    drawn = schedule.timesteps()[torch.bucketize(s, between)]
    inside = drawn[torch.isin(drawn, usable)]
    if not inside.numel():
        raise UserError(
            f"no noise level is ever drawn in the window [{low}, {high}): widen it, or use --timestep-draw grid"
        )
    return inside

"""What a Config leaves open is decided here, once the model and the device are known; and what a person should be told of it."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from dpo.common.errors import UserError
from dpo.settings.config import Config, change, flatten, specs

STEPS = 2000  # updates when neither steps nor epochs is given


def resolve(
    cfg: Config,
    *,
    family: str,
    prediction_type: str,
    device: str,
    beta: float = 2000.0,
    guidance: float = 7.5,
    native_resolution: int = 512,
    turbo: bool = False,
    num_timesteps: int = 1000,
    bf16: bool = True,
) -> tuple[Config, list[str]]:
    """`cfg` with every "auto" and None decided (unless None is the decision), and a line for the log on each choice made.

    `prediction_type` is what the model's scheduler says, `beta` and `guidance` are the family's defaults, `native_resolution` is
    the side the model was trained at in pixels, `turbo` says that it is distilled to four steps, `bf16` that the device has it.
    """
    if cfg.model.family not in ("auto", family):
        raise UserError(f"--family {cfg.model.family}: the model is of family {family}; leave --family out")
    if cfg.model.prediction_type != "auto":
        prediction_type = cfg.model.prediction_type
    values = {"family": family, "prediction_type": prediction_type, "device": device}
    values |= _of_model(cfg, native_resolution, turbo, num_timesteps, guidance)
    values |= _of_method(cfg, beta, prediction_type)
    values |= _of_device(cfg, device, bf16)
    values |= _of_length(cfg)
    decided = change(cfg, **values)
    return decided, _notes(cfg, decided, device)


def _of_model(cfg: Config, native: int, turbo: bool, num_timesteps: int, guidance: float) -> dict[str, Any]:
    model, method, out = cfg.model, cfg.method, cfg.output
    timesteps = model.timesteps if model.timesteps != "auto" else "turbo" if turbo else "all"
    few = timesteps == "turbo"
    high = num_timesteps if method.window_high is None else method.window_high
    if high > num_timesteps:
        raise UserError(f"window_high = {high}: the model has {num_timesteps} timesteps")
    return {
        "timesteps": timesteps,
        "resolution": cfg.data.resolution or native,
        "window_high": high,
        "sample_steps": out.sample_steps or (4 if few else 50),
        "sample_guidance": (0.0 if few else guidance) if out.sample_guidance is None else out.sample_guidance,
    }


def _of_method(cfg: Config, beta: float, prediction_type: str) -> dict[str, Any]:
    single = _single_shot(cfg.method.method, prediction_type)
    own_reference = cfg.model.unet_init is not None and cfg.model.reference_model == "base"
    reference = "adapter" if cfg.lora.lora and not own_reference else "copy"
    return {
        "beta": cfg.method.beta or (beta / 10 if single else beta),
        "alpha": cfg.lora.alpha or float(cfg.lora.rank),
        "reference": reference if cfg.runtime.reference == "auto" else cfg.runtime.reference,
    }


def _single_shot(method: str, prediction_type: str) -> bool:
    """Whether errors carry the weight that averages about twenty, so that beta is a tenth; on the v error it is below one."""
    return method in ("dde", "dde-single") and prediction_type == "epsilon"


def _of_device(cfg: Config, device: str, bf16: bool) -> dict[str, Any]:
    run = cfg.runtime
    gpu = device.startswith("cuda")
    precision = run.precision if run.precision != "auto" else ("bf16" if bf16 else "fp16") if gpu else "fp32"
    if precision == "fp16" and not gpu:
        precision = "fp32"
    if run.kernels == "triton" and not gpu:
        raise UserError("kernels = triton needs a GPU: use --kernels torch or auto")
    optimizer = "adamw8bit" if precision == "bf16-pure" or (gpu and precision != "fp64") else "adamw"
    return {
        "precision": precision,
        "optimizer": optimizer if cfg.optim.optimizer == "auto" else cfg.optim.optimizer,
        "channels_last": ("on" if gpu else "off") if run.channels_last == "auto" else run.channels_last,
        "kernels": ("triton" if gpu and find_spec("triton") else "torch") if run.kernels == "auto" else run.kernels,
        "offload": ("on" if gpu and cfg.data.data_format == "store" else "off") if run.offload == "auto" else run.offload,
    }


def _of_length(cfg: Config) -> dict[str, Any]:
    steps = STEPS if cfg.optim.steps is None and cfg.optim.epochs is None else cfg.optim.steps
    return {"steps": steps, "epochs": cfg.optim.epochs if steps is None else None}


def _notes(asked: Config, decided: Config, device: str) -> list[str]:
    before, after = flatten(asked), flatten(decided)
    told = ("precision", "optimizer", "beta", "resolution", "timesteps", "reference", "kernels")
    chosen = [f"{name} {_text(after[name])}" for name in told if before[name] != after[name]]
    notes = [f"decided: {', '.join(chosen)}"] if chosen else []
    if asked.runtime.precision == "fp16" and decided.runtime.precision == "fp32":
        notes.append("precision fp16 needs a GPU: fp32 is used")
    if decided.model.timesteps == "turbo":
        notes.append("Turbo: timesteps 249, 499 and 749; at 999 both images are the same noise, so nothing can be learnt there")
    return notes


def learning_rate(cfg: Config, processes: int = 1) -> float:
    """The peak learning rate that the optimizer sees."""
    return cfg.optim.learning_rate * (cfg.optim.effective_batch * processes if cfg.optim.scale_lr else 1)


def total_steps(cfg: Config, pairs: int, processes: int = 1) -> int:
    """Updates of the whole run, for a training set of so many usable pairs."""
    if cfg.optim.steps is not None:
        return cfg.optim.steps
    if cfg.optim.epochs is None:
        return STEPS
    return max(1, math.ceil(cfg.optim.epochs * pairs / (cfg.optim.effective_batch * processes)))


def resume_changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Settings that differ between a checkpoint and the run that resumes it: (allowed and worth saying, refused).

    Both are resolved. Changes that alter nothing but convenience are in neither list.
    """
    allowed, refused = [], []
    before, after = flatten(old), flatten(new)
    for name, spec in specs().items():
        if before[name] == after[name]:
            continue
        rule = _rule(name, spec.meta["resume"], old, new)
        text = f"{name} {_text(before[name])} -> {_text(after[name])}"
        if rule == "said":
            allowed.append(text)
        elif rule == "refused":
            refused.append(text)
    return allowed, refused


def _rule(name: str, rule: str, old: Config, new: Config) -> str:
    """A field's rule for changes on resume, for the few whose rule depends on their values."""
    if name == "precision":
        kinds = {old.runtime.precision, new.runtime.precision}
        return "said" if kinds <= {"fp32", "bf16", "fp16"} else "refused"  # all of these keep fp32 weights
    if name == "ema":
        return "said" if old.optim.ema and new.optim.ema else "refused"
    if name in ("steps", "epochs"):
        return rule if new.optim.scheduler == "constant" else "said"  # the other schedules end with the run
    if name in ("rank", "alpha", "target_modules", "lora_dropout", "lora_format") and not (old.lora.lora or new.lora.lora):
        return "free"
    return rule


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

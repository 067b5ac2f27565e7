"""What a Config leaves open is decided here, once the model and the device are known; and what a person should be told of it."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from dpo.config import Config, change, flatten, specs
from dpo.errors import UserError

STEPS = 2000  # updates when neither steps nor epochs is given
LOWEST_RATE = 1e-7  # nothing published trains below this
HIGHEST_SINGLE_SHOT_BETA = 1000.0
FEWEST_PAIRS = 16  # in a full fine-tuning update
HIGHEST_RATE = {"full": 1e-4, "lora": 2e-3}


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


def headline(cfg: Config, processes: int = 1) -> str:
    """The line that a run starts with: what is trained, effective batch, learning rate, beta."""
    optim, method = cfg.optim, cfg.method
    what = f"LoRA of rank {cfg.lora.rank}" if cfg.lora.lora else "full UNet"
    split = f"{optim.batch_size} x {optim.accumulation}" + (f" x {processes} processes" if processes > 1 else "")
    rate = f"learning rate {learning_rate(cfg, processes):.4g}" + (
        f" ({optim.learning_rate:g} x batch)" if optim.scale_lr else ""
    )
    warm = f", {optim.scheduler} after {optim.warmup} updates of warm-up" if optim.warmup else f", {optim.scheduler}"
    beta = "" if method.method == "sft" else f", beta {_text(method.beta)}"
    return f"{method.method}, {what}: {optim.effective_batch * processes} pairs an update ({split}), {rate}{warm}{beta}"


def warnings(cfg: Config, processes: int = 1) -> list[str]:
    """What is allowed but probably not meant."""
    found = []
    rate, batch = learning_rate(cfg, processes), cfg.optim.effective_batch * processes
    highest = HIGHEST_RATE["lora" if cfg.lora.lora else "full"]
    if rate < LOWEST_RATE:
        scaled = "it is multiplied by the batch, but the published one has 2048 pairs" if cfg.optim.scale_lr else "no --scale-lr"
        found.append(
            f"learning rate {rate:g} hardly trains ({scaled}): the paper prints 2.048e-8, a thousandth of the 2.048e-5 of the "
            "published code (1e-8 x 2048 pairs)"
        )
    elif rate > highest:
        what = "LoRA" if cfg.lora.lora else "full fine-tuning"
        found.append(f"learning rate {rate:g} is high for {what} (published: 1e-5 to 2e-5); expect images to turn to noise")
    if _single_shot(cfg.method.method, cfg.model.prediction_type) and (cfg.method.beta or 0) > HIGHEST_SINGLE_SHOT_BETA:
        found.append(
            f"beta {cfg.method.beta:g} is high for {cfg.method.method}, whose weight averages about 20: "
            "the default is a tenth of dpo's"
        )
    if cfg.model.model and not cfg.lora.lora and batch < FEWEST_PAIRS:
        found.append(f"{batch} pairs an update is few for full fine-tuning (published: 2048); raise --accumulation")
    if cfg.runtime.precision == "bf16-pure" and cfg.optim.accumulation > 16:
        found.append(
            f"bf16-pure sums the gradients of {cfg.optim.accumulation} passes in bf16, which loses the small ones: raise --batch-size"
        )
    if cfg.optim.steps is not None and cfg.optim.warmup >= cfg.optim.steps:
        found.append(
            f"the warm-up of {cfg.optim.warmup} updates does not end within {cfg.optim.steps}: the rate stays below its peak"
        )
    if cfg.model.model and not cfg.data.validation_data and not cfg.data.validation_fraction and cfg.output.validate_every:
        found.append("no held-out pairs, so no held-out accuracy: give --validation-data or --validation-fraction 0.02")
    return found


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

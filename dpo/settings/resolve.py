"""Decides what a Config leaves open, once the model and the device are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dpo.common.errors import UserError
from dpo.common.words import multiples, number_of
from dpo.methods import METHODS
from dpo.settings.config import Config, change, flatten
from dpo.settings.fields import brief

ADAM_BETA2, LION_BETA2 = 0.999, 0.99  # torch's default, and that of Lion (Chen et al. 2023)
MOST = 1024  # processes that a refusal looks through for numbers that fit
SAFEGUARD = (0.9, 0.6)  # margin of sdpo for SD 1.5 and SDXL, as published
STEPS = 2000  # updates when neither steps nor epochs is given


@dataclass(frozen=True)
class ModelFacts:
    """What the decisions need to know of the model: its own numbers and its family's defaults."""

    family: str
    prediction_type: str  # "epsilon" or "v_prediction", from its scheduler; "flow_prediction" by its family
    beta: float = 2000.0  # the family's default
    guidance: float = 7.5  # the family's default
    native_resolution: int = 512  # pixels of a side that it was trained at
    largest: int | None = None  # pixels of a side that it can take; None: any
    turbo: bool = False  # distilled to four steps
    num_timesteps: int = 1000
    empty_is_zeros: bool = False  # diffusers samples it with zeros where no negative prompt is given
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # the family's default
    text_tokens: int | None = None  # of a caption, where the family lets that be chosen
    train_guidance: float | None = None  # that the model is told, where it takes one
    side_factor: int = 1  # what the sides of its images are multiples of
    shift_by_size: bool = False  # whether a flow's noise levels depend on the size of the images

    @property
    def flow(self) -> bool:
        return self.prediction_type == "flow_prediction"


@dataclass(frozen=True)
class DeviceFacts:
    """What the decisions need to know of the device."""

    name: str  # as torch writes it: cpu, cuda, cuda:1
    bf16: bool = True  # whether it computes in bf16
    triton: bool = True  # whether that package is there

    @property
    def gpu(self) -> bool:
        return self.name.startswith("cuda")


def resolve(config: Config, model: ModelFacts, device: DeviceFacts) -> tuple[Config, list[str]]:
    """`config` with every "auto" and None decided (unless None is the decision), and lines for the log on the choices.

    Raises UserError for what this model or device cannot do.
    """
    check_family(config, model)
    asked, dropped = config.model, config.data.dropped_caption
    prediction_type = model.prediction_type if asked.prediction_type == "auto" else asked.prediction_type
    values = {"family": model.family, "prediction_type": prediction_type, "device": device.name}
    if dropped == "auto":
        values["dropped_caption"] = "zeros" if model.empty_is_zeros else "empty"
    values |= _of_model(config, model)
    values |= _of_method(config, model, prediction_type)
    values |= _of_device(config, model, device)
    values |= _of_length(config)
    decided = change(config, **values)
    return decided, [*_notes(config, decided, device), *_of_dropped(decided, model)]


def check_family(config: Config, model: ModelFacts) -> None:
    """Raises UserError for settings that do not go with a family; of `model` family, prediction type and turbo count."""
    asked = config.model
    if asked.family not in ("auto", model.family):
        raise UserError(f"--family {asked.family}: the model is of family {model.family}; leave --family out")
    if config.data.dropped_caption == "zeros" and model.family != "sdxl":
        raise UserError(
            f"--dropped-caption zeros: only SDXL is sampled with zeros in the place of an empty caption, and this model is "
            f"of family {model.family}; leave it at auto"
        )
    _check_flow(config, model)


def _check_flow(config: Config, model: ModelFacts) -> None:
    """Raises UserError for settings of diffusion with a model of flow matching, and the other way round."""
    asked, draw = config.model, config.method.timestep_draw
    if asked.prediction_type != "auto" and model.flow != (asked.prediction_type == "flow_prediction"):
        raise UserError(
            f"--prediction-type {asked.prediction_type}: the model is of family {model.family}, which predicts "
            f"{model.prediction_type}; leave it at auto"
        )
    if draw != "grid" and not model.flow:
        raise UserError(
            f"--timestep-draw {draw} draws noise levels of a flow, and family {model.family} is none: leave it out"
        )
    if not model.flow:
        return
    if draw != "grid" and "turbo" in (asked.timesteps, "turbo" if asked.timesteps == "auto" and model.turbo else ""):
        raise UserError(f"--timestep-draw {draw}: the model has four timesteps, which are drawn alike; leave it out")
    if asked.zero_snr != "auto":
        raise UserError(f"--zero-snr {asked.zero_snr}: a flow's levels end in pure noise as they are; leave it at auto")
    if config.lora.lora_format == "kohya":
        raise UserError(f"--lora-format kohya: sd-scripts has no such names for family {model.family}; use diffusers")
    if config.runtime.cuda_graph and model.family == "qwen":
        raise UserError(
            "--cuda-graph: this family's transformer in diffusers copies a number to the GPU in every pass; leave it out"
        )
    if config.runtime.precision == "fp16":
        raise UserError(
            f"--precision fp16: the text encoders of family {model.family} overflow in it; use bf16 or fp32"
        )


def _of_model(config: Config, model: ModelFacts) -> dict[str, Any]:
    asked, method, out = config.model, config.method, config.output
    timesteps = asked.timesteps if asked.timesteps != "auto" else "turbo" if model.turbo else "all"
    few = timesteps == "turbo"
    high = model.num_timesteps if method.window_high is None else method.window_high
    if high > model.num_timesteps:
        raise UserError(f"window_high = {high}: the model has {model.num_timesteps} timesteps")
    side = config.data.resolution or model.native_resolution
    if model.largest is not None and side * (2**0.5 if config.data.buckets else 1) > model.largest:
        shape = ", whose buckets are up to 1.42 times as long," if config.data.buckets else ""
        raise UserError(f"--resolution {side}{shape} is more than the model can take: {model.largest} pixels of a side")
    if side % model.side_factor:
        raise UserError(f"--resolution {side}: the model takes sides that are {multiples(model.side_factor, side)}")
    guidance = (model.train_guidance or 0.0) if few else model.guidance
    return {
        "timesteps": timesteps,
        "text_tokens": model.text_tokens,
        "train_guidance": model.train_guidance,
        "resolution": side,
        "window_high": high,
        "sample_steps": out.sample_steps or (4 if few else 50),
        "sample_guidance": guidance if out.sample_guidance is None else out.sample_guidance,
    }


def _of_method(config: Config, model: ModelFacts, prediction_type: str) -> dict[str, Any]:
    method = config.method
    beta = model.beta / 2 if method.method == "kto" else model.beta  # as published: its formula has no 1/2
    own_reference = config.model.unet_init is not None and config.model.reference_model == "base"
    bounded = "safeguard" in METHODS[method.method].settings
    reference = "adapter" if config.lora.lora and not own_reference else "copy"
    return {
        "beta": method.beta or (beta / 10 if large_weight(method.method, prediction_type) else beta),
        "safeguard": SAFEGUARD[model.family == "sdxl"] if bounded and method.safeguard is None else method.safeguard,
        "alpha": config.lora.alpha or float(config.lora.rank),
        "target_modules": config.lora.target_modules or model.lora_targets,
        "reference": reference if config.runtime.reference == "auto" else config.runtime.reference,
    }


def large_weight(method: str, prediction_type: str) -> bool:
    """Whether the method's weight averages about 20, so that the default beta is a tenth of dpo's.

    That is the single-shot weight on the epsilon error; on the v error it is below 1.
    """
    return METHODS[method].weight == "single-shot" and prediction_type == "epsilon"


def precision_of(asked: str, device: DeviceFacts, *, flow: bool) -> str:
    """The precision that the setting `asked` means on this device; flow: for a model of flow matching."""
    half = "bf16" if device.bf16 else "fp32" if flow else "fp16"
    if not device.gpu and asked in ("auto", "fp16"):
        return "fp32"
    return half if asked == "auto" else asked


def _of_device(config: Config, model: ModelFacts, device: DeviceFacts) -> dict[str, Any]:
    runtime, gpu = config.runtime, device.gpu
    precision = precision_of(runtime.precision, device, flow=model.flow)
    if runtime.kernels == "triton" and not gpu:
        missing = "a GPU" if device.triton else "a GPU and the package triton, which is not installed"
        raise UserError(f"kernels = triton needs {missing}: use --kernels torch or auto")
    if runtime.kernels == "triton" and not device.triton:
        raise UserError(
            "kernels = triton: the package triton is not installed (on Linux: pip install triton); use --kernels torch or auto"
        )
    if runtime.cuda_graph and not gpu:
        raise UserError("--cuda-graph needs a GPU, and there is none here: leave --cuda-graph out")
    if runtime.cuda_graph and precision == "fp16":
        raise UserError("--cuda-graph is not for precision fp16, this GPU's own: use --precision fp32, or leave it out")
    if runtime.compile and gpu and not device.triton:
        raise UserError("--compile on a GPU needs the package triton, which is not installed: leave --compile out")
    optimizer = "adamw8bit" if precision == "bf16-pure" or (gpu and precision != "fp64") else "adamw"
    optimizer = optimizer if config.optim.optimizer == "auto" else config.optim.optimizer
    own_beta2 = LION_BETA2 if optimizer == "lion8bit" else ADAM_BETA2
    encoded = config.data.data_format == "store"
    return {
        "precision": precision,
        "optimizer": optimizer,
        "adam_beta2": own_beta2 if config.optim.adam_beta2 is None else config.optim.adam_beta2,
        "channels_last": ("on" if gpu else "off") if runtime.channels_last == "auto" else runtime.channels_last,
        "kernels": ("triton" if gpu and device.triton else "torch") if runtime.kernels == "auto" else runtime.kernels,
        "activation_offload": runtime.activation_offload and gpu,
        # A run has decided before, from a plan (planning/recompute.py); here nobody asked for one.
        "checkpointing": ("on" if gpu else "off") if runtime.checkpointing == "auto" else runtime.checkpointing,
        "keep_encoded": "off" if encoded or config.data.crop == "random" or runtime.keep_encoded == "off" else "on",
        "offload": ("on" if gpu and encoded else "off") if runtime.offload == "auto" else runtime.offload,
    }


def _of_length(config: Config) -> dict[str, Any]:
    steps = STEPS if config.optim.steps is None and config.optim.epochs is None else config.optim.steps
    return {"steps": steps, "epochs": config.optim.epochs if steps is None else None}


def dealt(config: Config, processes: int) -> Config:
    """`config` with the pairs of an update over all processes, and the passes of each.

    Raises UserError where those pairs cannot be dealt out in whole passes.
    """
    optim = config.optim
    if optim.gradient_release and processes > 1:
        raise UserError(
            f"--gradient-release updates weights before the gradients of {processes} processes are summed: leave it out, or "
            "train on one process"
        )
    if config.runtime.cuda_graph and processes > 1:
        raise UserError(
            f"--cuda-graph is for one process, and cannot sum gradients over {processes}: leave it out, or train on one"
        )
    if config.method.method == "kto" and config.method.kto_center == "batch" and processes > 1:
        raise UserError(
            f"--kto-center batch is of one process's micro-batch, and there are {processes}: use --kto-center update"
        )
    at_once = optim.batch_size * processes
    if optim.effective_batch is None:
        return change(config, effective_batch=at_once * optim.accumulation)
    pairs = optim.effective_batch
    if pairs % at_once == 0:
        return change(config, accumulation=pairs // at_once)
    counts = [count for count in range(1, MOST + 1) if pairs % (optim.batch_size * count) == 0]
    sizes = [size for size in range(1, 2 * optim.batch_size + 1) if pairs % (size * processes) == 0]
    singly = [count for count in range(1, MOST + 1) if pairs % count == 0]  # where each pass is one pair
    ways = [f"{_few(counts, processes)} processes"] if counts else []
    ways += [f"--batch-size {_few(sizes, optim.batch_size)}"] if sizes else []
    if not ways:
        ways = [f"{_few(singly, processes)} processes with --batch-size 1"]
    whole = pairs // at_once
    ways += [f"--effective-batch {_few([n * at_once for n in (whole, whole + 1) if n], pairs)}"]
    raise UserError(
        f"an update of {number_of(pairs, 'pairs')} (--effective-batch) does not divide into {processes} x {optim.batch_size} (processes x "
        f"--batch-size): what fits is {', '.join(ways[:-1])}, or {ways[-1]}"
    )


def _few(numbers: list[int], near: int) -> str:
    """The three of `numbers` next to `near`, ascending, in words."""
    chosen = sorted(sorted(numbers, key=lambda number: abs(number - near))[:3])
    return " or ".join(map(str, chosen))


def _notes(asked: Config, decided: Config, device: DeviceFacts) -> list[str]:
    before, after = flatten(asked), flatten(decided)
    told = ("precision", "optimizer", "beta", "resolution", "timesteps", "reference", "kernels")
    chosen = [f"{name} {brief(after[name])}" for name in told if before[name] != after[name]]
    notes = [f"decided: {', '.join(chosen)}"] if chosen else []
    if not device.triton:
        notes.append("triton is not installed: everything runs on plain torch")
    if asked.runtime.precision == "fp16" and decided.runtime.precision == "fp32":
        notes.append("precision fp16 needs a GPU: fp32 is used")
    if asked.runtime.activation_offload and not device.gpu:
        notes.append("activation_offload has no effect on a CPU, whose memory is the host's")
    if asked.runtime.keep_encoded == "on" and decided.data.data_format == "store":
        notes.append("keep_encoded has no effect with a prepared store, whose pairs are encoded already")
    if decided.optim.optimizer == "lion8bit" and asked.optim.adam_beta2 is None:
        notes.append(f"lion8bit: betas {asked.optim.adam_beta1:g} and {LION_BETA2:g}, Lion's own and not Adam's")
    if decided.model.timesteps == "turbo" and decided.model.prediction_type != "flow_prediction":
        dead = decided.model.prediction_type == "epsilon" and decided.model.zero_snr != "off"
        notes.append(
            "Turbo: timesteps 249, 499 and 749; at 999 both images are the same noise, so nothing can be learnt there"
            if dead
            else "Turbo: timesteps 249, 499, 749 and 999"
        )
    return notes


def _of_dropped(decided: Config, model: ModelFacts) -> list[str]:
    """A line on what a dropped caption becomes, where diffusers samples without a negative prompt in another way."""
    if not decided.data.caption_dropout or model.family != "sdxl":
        return []
    own, other = ("zeros", 'the encoding of ""') if model.empty_is_zeros else ('the encoding of ""', "zeros")
    sampled = f"diffusers samples this model without a negative prompt with {own}"
    if (decided.data.dropped_caption == "zeros") == model.empty_is_zeros:
        flag = "empty" if model.empty_is_zeros else "zeros"
        return [f"dropped captions train {own}: {sampled} (--dropped-caption {flag} trains {other})"]
    flag = "zeros" if model.empty_is_zeros else "empty"
    return [f"dropped captions train {other}, but {sampled}, which --dropped-caption {flag} trains"]


def learning_rate(config: Config) -> float:
    """The peak learning rate of the optimizer, multiplied by the effective batch where --scale-lr asks for it."""
    return config.optim.learning_rate * (config.optim.pairs if config.optim.scale_lr else 1)


def total_steps(config: Config, pairs: int) -> int:
    """Updates of the whole run, for a training set of `pairs` usable pairs."""
    if config.optim.steps is not None:
        return config.optim.steps
    if config.optim.epochs is None:
        return STEPS
    epochs = Fraction(str(config.optim.epochs))  # 1.1 * 100 is above 110 in floats: an update more than was asked for
    return max(1, math.ceil(epochs * pairs / config.optim.pairs))

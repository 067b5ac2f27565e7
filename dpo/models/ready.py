"""A model made ready for work: loaded, settings decided, cast and placed. What every command needs first."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csrc_triton.language import HAS_TRITON
from dpo import schedule
from dpo.common.errors import UserError
from dpo.common.libraries import quiet
from dpo.common.words import first_line
from dpo.models.buffers import cast_weights
from dpo.models.denoiser import available_attention, fix_projections, use_attention, use_checkpointing, widen_others
from dpo.models.family import Denoiser, Model, Vae
from dpo.models.load import family_of, load, read_index, read_scheduler
from dpo.models.offload import use_offload
from dpo.models.parts import config_of, guidance_of, is_few_steps, tokens_of
from dpo.models.pipeline import as_trained, scheduler_of, settings_of
from dpo.settings.config import Config, Runtime, change
from dpo.settings.resolve import DeviceFacts, ModelFacts, check_family, resolve

log = logging.getLogger("dpo")

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = {"bf16-pure": torch.bfloat16, "fp64": torch.float64}


def pick_device(name: str) -> torch.device:
    """The device of that name, made the current one; "auto" is the GPU when there is one.

    Raises UserError for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu or install a CUDA build of torch")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: there is no such device; auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: runs on cpu or cuda; name one of these, or auto")
    if device.type == "cuda" and device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            raise UserError(
                f"--device {name}: torch sees {count} GPU{'s' * (count > 1)} here, the last is cuda:{count - 1}"
            )
        torch.cuda.set_device(device)  # libraries allocate and launch on the current device
    return device


def facts_of(device: torch.device) -> DeviceFacts:
    """What the decisions need to know of the device."""
    return DeviceFacts(str(device), bf16=device.type != "cuda" or torch.cuda.is_bf16_supported(), triton=HAS_TRITON)


def load_named(
    config: Config, narrow: Collection[str] = (), *, without_denoiser: bool = False, by_files: bool = False
) -> Model:
    """The model that the settings name, in fp32 on the CPU but for what `load` keeps narrow or leaves out. Raises UserError.

    by_files: its files alone say whether it is distilled to a few steps. A name that says Turbo matters in training, which asks.
    """
    named = config.model
    assert named.model is not None, "a command names its model, or takes the embedded one"
    return load(
        named.model,
        family=named.family,
        revision=named.revision,
        variant=named.variant,
        vae=named.vae,
        single_file_config=named.single_file_config,
        cache_dir=named.cache_dir,
        timesteps="all" if by_files and named.timesteps == "auto" else named.timesteps,
        text_tokens=named.text_tokens,
        guidance=named.train_guidance,
        narrow=narrow,
        without_denoiser=without_denoiser,
    )


def held_narrow(config: Config, device: torch.device, *, frozen: bool = False) -> tuple[str, ...]:
    """The parts that are held frozen in half precision, and that nothing changes before they are cast to it.

    frozen: the denoiser's own weights are, as those of a LoRA run.

    To hold them as their files do until then gives the same bits: a half widens exactly. The VAE is small, and its
    statistics are read in fp32.
    """
    precision, named = config.runtime.precision, config.model
    half = precision in (*HALF, "bf16-pure") or (precision == "auto" and device.type == "cuda")
    own = (
        (config.lora.lora or frozen)
        and precision != "bf16-pure"
        and named.unet_init is None
        and named.lora_init is None
    )
    return (*(("text",) if half else ()), *(("denoiser",) if half and own else ()))


def check_settings(config: Config) -> None:
    """Raises UserError for settings that the family of a model refuses, where its folder is here and before pairs are read.

    `decide` asks again, of every model.
    """
    quiet()  # before anything else imports diffusers
    import diffusers

    named = config.model
    assert named.model is not None, "a command names its model, or takes the embedded one"
    place = Path(named.model).expanduser()
    if not (place / "model_index.json").is_file():
        return
    index = read_index(place)
    family = family_of(index, named.family)
    said, _ = read_scheduler(place, named.model, family)
    denoiser = config_of(getattr(diffusers, family.denoiser_class), place, family.denoiser)
    turbo = is_few_steps(family, named.model, index, denoiser, said, named.timesteps)
    kind = schedule.FLOW if family.flow else said["prediction_type"]
    check_family(config, ModelFacts(family=family.name, prediction_type=kind, turbo=turbo))
    tokens_of(family, named.model, named.text_tokens)
    guidance_of(denoiser, named.model, named.train_guidance)


def _against(config: Config, model: Model) -> list[str]:
    """Lines for the log where a flag goes before what the model says of itself."""
    named, said, lines = config.model, model.scheduler_config, []
    if named.prediction_type not in ("auto", model.prediction_type):
        lines.append(
            f"--prediction-type {named.prediction_type} is followed, though the model says {model.prediction_type}"
        )
    zero = bool(said.get("rescale_betas_zero_snr")) or model.turbo
    if named.zero_snr != "auto" and (named.zero_snr == "on") != zero:
        lines.append(f"--zero-snr {named.zero_snr} is followed, though the model says {'on' if zero else 'off'}")
    if model.turbo and named.timesteps == "all":
        why = "the model is distilled to a few steps" if model.family.flow else "the model's scheduler is Turbo's"
        lines.append(f"--timesteps all is followed, though {why}")
    return lines + _far_from(config.data.resolution, model.geometry.native)


def _far_from(side: int | None, native: int) -> list[str]:
    """A line for the log on a resolution of twice the model's own side or more, or of half of it or less."""
    if side is None or native / 2 < side < native * 2:
        return []
    more = f"a step takes {(side / native) ** 2:.0f} times as much, or more"
    why = more if side > native else "it was not made for images so small"
    return [f"--resolution {side}: the model's own is {native} pixels, and {why}"]


def load_model(
    config: Config,
    device: torch.device,
    *,
    narrow: Collection[str] = (),
    without_denoiser: bool = False,
    by_files: bool = False,
) -> tuple[Config, Model, schedule.Plan, list[str]]:
    """The config with everything decided, the model on the CPU, its noise schedule, and log lines.

    The model is in fp32; narrow: but for these parts (`load`), where a cast to half precision follows; without_denoiser:
    its denoiser is not run; by_files: as of `load_named`. The log lines say what was decided. Raises UserError for what
    cannot be loaded, or what this model or device cannot do.
    """
    model = load_named(config, narrow, without_denoiser=without_denoiser, by_files=by_files)
    for line in model.notes:
        log.info("%s", line)
    config, plan, decided = decide(config, model, facts_of(device))
    config = change(config, attention=available_attention(config.runtime.attention))  # warned once, not for each UNet
    return config, model, plan, decided


def plan_of(config: Config, model: Model, size: tuple[int, int] | None = None) -> tuple[schedule.Plan, list[str]]:
    """The noise schedule that a decided config trains a model with, and lines for the log. Raises UserError.

    size: height and width of the images in pixels, None for the square of the resolution.
    """
    few, said = config.model.timesteps == "turbo", model.scheduler_config
    if model.family.flow is None:
        zero_snr = {"on": True, "off": False}.get(config.model.zero_snr)
        return schedule.from_scheduler(
            said, prediction_type=config.model.prediction_type, turbo=few, zero_snr=zero_snr
        ), []
    mu, told = None, f"noise levels: shift {said['shift']:g}"
    if said["use_dynamic_shifting"]:
        side = config.data.resolution
        assert side is not None, "decided before"
        high, wide = size or (side, side)
        tokens = model.geometry.tokens(high, wide)
        flow = model.family.flow
        sampled = FEW if few or flow.steps is None else flow.steps
        mu = flow.mu(said, tokens, sampled)
        told = f"noise levels: shifted by mu {mu:.3f}, that of the {tokens} tokens of {wide} x {high} pixels"
        told += "" if flow.steps is None else f" sampled in {sampled} steps"
    steps = steps_of(model, mu) if few else None
    if steps is not None:
        levels = ", ".join(f"{level:.3f}" for level in steps)
        told += f"; trained on those of {FEW} steps, as a model distilled to them (else say --timesteps all): {levels}"
    return schedule.flow_from_scheduler(said, mu=mu, steps=steps), [told]


FEW = 4  # steps that distilled models are sampled with


def steps_of(model: Model, mu: float | None) -> list[float]:
    """The noise levels of the FEW steps of a distilled model of flow matching, as its pipeline samples, descending."""
    assert model.family.flow is not None, "of a flow"
    given = {"sigmas": [1 - k / FEW for k in range(FEW)]} if model.family.flow.even_steps else {}
    scheduler: Any = scheduler_of(model)
    scheduler.set_timesteps(**({} if given else {"num_inference_steps": FEW}), **given, mu=mu)
    return scheduler.sigmas[:-1].tolist()


def decide(config: Config, model: Model, device: DeviceFacts) -> tuple[Config, schedule.Plan, list[str]]:
    """The config with everything decided, the model's noise schedule, and lines for the log that say what was decided.

    Needs no weights. Makes the model's scheduler follow the training. Raises UserError for what this model or device
    cannot do.
    """
    asked = config
    facts = ModelFacts(
        family=model.family.name,
        prediction_type=model.prediction_type,
        beta=model.family.beta,
        guidance=model.family.guidance,
        native_resolution=model.geometry.native,
        largest=model.geometry.largest,
        turbo=model.turbo,
        num_timesteps=model.scheduler_config["num_train_timesteps"],
        empty_is_zeros=bool(settings_of(model).get("force_zeros_for_empty_prompt")),
        lora_targets=model.family.lora_targets,
        text_tokens=model.text_tokens,
        train_guidance=model.guidance,
        side_factor=model.geometry.side_factor if model.family.flow else 1,
        shift_by_size=bool(model.scheduler_config.get("use_dynamic_shifting")),
    )
    config, decided = resolve(config, facts, device)
    for line in _against(asked, model):
        log.warning("%s", line)
    plan, told = plan_of(config, model)
    decided += told
    model.resampled, said = as_trained(model.scheduler_config, plan)
    model.scheduler_config |= model.resampled  # of sample images and of what is saved
    steps = config.output.sample_steps
    assert steps is not None  # decided by `resolve`
    try:
        scheduler: Any = scheduler_of(model)
        scheduler.set_timesteps(
            steps, **({"mu": 1.0} if facts.shift_by_size else {})
        )  # any image's: its pipeline knows
    except Exception as error:  # each class has checks of its own
        raise UserError(
            f"{model.source}: the scheduler cannot sample ({first_line(error)}); mend scheduler_config.json"
        ) from error
    return config, plan, [*decided, *said]


def cast(model: Model, precision: str, vae: str = "auto", *, frozen: bool = False) -> None:
    """Casts every module, in place, to its dtype for `precision`; vae: a precision of the VAE's own, or "auto".

    frozen: the denoiser's own weights are not trained, and `halve` follows: what that casts stays as it was loaded.

    Under autocast the denoiser keeps fp32 master weights, and the VAE and text encoders, which are not trained, are in
    half precision. A VAE that overflows in fp16 (SDXL's) stays in fp32 with fp16.
    """
    own = WEIGHTS.get(precision, torch.float32)
    read_only = HALF.get(precision, own)
    if frozen and precision in HALF:
        widen_others(model.denoiser)
    else:
        cast_weights(model.denoiser, own)
    overflows = precision == "fp16" and model.family.vae_overflows_in_fp16
    chosen = {"auto": torch.float32 if overflows else read_only, "fp32": torch.float32, **HALF}[vae]
    model.scaling = model.scaling or model.family.scaling(model.vae)  # before its statistics are rounded
    cast_weights(model.vae, chosen)
    if vae != "auto":
        _decode_in(model.vae, chosen)
    for encoder in model.text_encoders:
        cast_weights(encoder, read_only)


def _decode_in(vae: Vae, dtype: torch.dtype) -> None:
    """Makes the decoder take latents of any dtype: a pipeline hands it those of the denoiser."""

    def cast_inputs(module: nn.Module, inputs: tuple) -> tuple:
        return tuple(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs)

    for part in (vae.post_quant_conv, vae.decoder):
        if part is not None:
            part.register_forward_pre_hook(cast_inputs)


def settle(runtime: Runtime, denoiser: Denoiser, device: torch.device) -> Denoiser:
    """The denoiser with device, layout, attention, checkpointing, kernels and compilation as `runtime` says.

    Policy and reference both pass through here, so that their numerics are the same.
    """
    denoiser.to(device)
    if runtime.channels_last == "on":
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not list it
    fix_projections(denoiser)
    use_attention(
        denoiser, runtime.attention, device, HALF.get(runtime.precision, WEIGHTS.get(runtime.precision, torch.float32))
    )
    use_checkpointing(denoiser, runtime.checkpointing)
    if runtime.activation_offload:
        use_offload(denoiser, device)
    if runtime.kernels == "triton":
        from dpo.models import kernels

        kernels.patch(denoiser)
    if runtime.compile:
        from dpo.models import compiled  # imports torch's compiler, which takes a second

        log.info("--compile: %d blocks, at their first calls", compiled.compile_blocks(denoiser))
    return denoiser

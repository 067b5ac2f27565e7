"""A diffusers pipeline around the loaded modules, made the same way for sampling and for saving."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from dpo.common.libraries import CAPTIONS
from dpo.models.family import Denoiser, Model
from dpo.schedule import FlowSchedule, Plan

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"

RESCALE = "rescale_betas_zero_snr"  # diffusers' name of zero terminal SNR (Lin et al. 2023, arXiv 2305.08891)
DDIM = "DDIMScheduler"


def _parameters(name: str) -> dict[str, Any]:
    """The settings that diffusers' class of that name reads, with their defaults (`inspect.Parameter.empty`: none)."""
    import diffusers

    found = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in found.items() if key != "self"}


def as_trained(config: Mapping[str, Any], plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """What must change in a scheduler's `config` so that it samples from `plan`, the schedule of the training.

    Returns the changed settings (none for a model trained as it came) and lines for the log. A class without zero
    terminal SNR gives way to DDIM, which samples both predictions from any schedule. Where the terminal SNR is zero,
    sampling must start at the last timestep, as training did: "trailing" (Lin et al. 2023, section 3.3); but not with
    epsilon prediction, which says nothing of an image there. Turbo keeps its own sampler: that is how it is published.
    A flow is trained as its scheduler says.
    """
    if isinstance(plan, FlowSchedule):
        return {}, []
    name = config.get("_class_name", DDIM)
    wanted: dict[str, Any] = {"prediction_type": plan.prediction_type}
    zero, turbo = bool(plan.alphas_cumprod[-1] < 1e-12), plan.chain is not None and not plan.velocity
    able = RESCALE in _parameters(name)
    if not turbo and zero != (able and bool(config.get(RESCALE, False))):
        wanted[RESCALE] = zero
        if zero:
            wanted["timestep_spacing"] = "trailing" if plan.velocity else "leading"
        if not able:
            wanted |= {"_class_name": DDIM, "clip_sample": False}  # latents are not confined to [-1, 1]
    changed = {key: value for key, value in wanted.items() if config.get(key) != value}
    if not config.get("prediction_type") and plan.prediction_type == "epsilon":
        del changed["prediction_type"]  # diffusers' default
    if not changed:
        return {}, []
    told = [f"{key} {value}" for key, value in changed.items() if key not in ("_class_name", "clip_sample")]
    swap = f"; {DDIM}, since {name} has no {RESCALE}" if "_class_name" in changed else ""
    return changed, [f"sample images and the saved scheduler follow the training: {', '.join(told)}{swap}"]


def scheduler_of(model: Model) -> DDIMScheduler:
    """A fresh scheduler of the class and settings that the model came with or is trained by (DDIM, or one like it)."""
    import diffusers

    kind = getattr(diffusers, model.scheduler_config.get("_class_name", DDIM))
    return kind.from_config(model.scheduler_config)


def settings_of(model: Model) -> dict[str, Any]:
    """The settings of the model's pipeline: the class's defaults, the source's, and what the family leaves out."""
    read = _parameters(model.family.pipeline)
    defaults = {name: value for name, value in read.items() if value is not inspect.Parameter.empty}
    own = {name: value for name, value in model.pipeline_config.items() if name in read}
    return defaults | own | model.family.pipeline_options(model)


def pipeline_of(model: Model, denoiser: Denoiser | None = None) -> Pipeline:
    """A pipeline over the loaded modules (shared, not copied), with `denoiser` in place of the model's own.

    Its settings are those of the source's pipeline, but for what the family leaves out.
    """
    import diffusers

    family = model.family
    parts: dict[str, Any] = {family.denoiser: denoiser if denoiser is not None else model.denoiser, "vae": model.vae}
    parts |= model.named_tokenizers() | model.named_encoders()
    pipe = getattr(diffusers, family.pipeline)(**settings_of(model) | parts, scheduler=scheduler_of(model))
    if model.text_tokens is not None:
        setattr(pipe, CAPTIONS, {"max_sequence_length": model.text_tokens})
    return pipe

"""A diffusers pipeline around the loaded modules, made the same way for sampling and for saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from dpo.models.family import Denoiser, Model

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"


def scheduler_of(model: Model) -> DDIMScheduler:
    """A fresh scheduler of the class and settings that the model came with (DDIM, or another of the same interface)."""
    import diffusers

    kind = getattr(diffusers, model.scheduler_config.get("_class_name", "DDIMScheduler"))
    return kind.from_config(model.scheduler_config)


def pipeline_of(model: Model, denoiser: Denoiser | None = None) -> Pipeline:
    """A pipeline over the loaded modules (shared, not copied), with `denoiser` in place of the model's own."""
    import diffusers

    family = model.family
    parts: dict[str, Any] = {family.denoiser: denoiser if denoiser is not None else model.denoiser, "vae": model.vae}
    parts |= dict(zip(family.tokenizers, model.tokenizers, strict=True))
    parts |= {name: encoder for (name, _), encoder in zip(family.text_encoders, model.text_encoders, strict=True)}
    return getattr(diffusers, family.pipeline)(**parts, scheduler=scheduler_of(model), **family.pipeline_options(model))

"""A diffusers pipeline around the loaded modules, for sampling and saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpo.models.family import Model


def scheduler_of(model: Model) -> Any:
    """The scheduler the model came with, for sampling."""
    import diffusers

    name = model.scheduler_config.get("_class_name", "PNDMScheduler")
    return getattr(diffusers, name).from_config(model.scheduler_config)


def pipeline_of(model: Model, unet: nn.Module | None = None) -> Any:
    """A diffusers pipeline around the loaded modules (shared, not copied), with `unet` in place of the model's own."""
    import diffusers

    kind = model.family
    parts = dict(zip(kind.tokenizers, model.tokenizers, strict=True))
    parts |= {name: module for (name, _), module in zip(kind.text_encoders, model.text_encoders, strict=True)}
    parts |= {"unet": unet if unet is not None else model.denoiser, "vae": model.vae, "scheduler": scheduler_of(model)}
    if kind.name == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, kind.pipeline)(**parts)


def pipeline(components: Model, unet: torch.nn.Module | None = None) -> Any:
    """A diffusers pipeline over the loaded modules (no copies), sampling with the model's own scheduler."""
    import diffusers

    family = components.family
    scheduler_class = getattr(diffusers, components.scheduler_config.get("_class_name", "DDIMScheduler"))
    modules = {"unet": components.denoiser if unet is None else unet, "vae": components.vae}
    modules |= dict(zip(family.tokenizers, components.tokenizers, strict=True))
    modules |= dict(zip((name for name, _ in family.text_encoders), components.text_encoders, strict=True))
    scheduler = scheduler_class.from_config(components.scheduler_config, prediction_type=components.prediction_type)
    extras: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if family.name == "sdxl":
        extras = {"add_watermarker": False, "force_zeros_for_empty_prompt": not components.turbo}
    return getattr(diffusers, family.pipeline)(scheduler=scheduler, **modules, **extras)

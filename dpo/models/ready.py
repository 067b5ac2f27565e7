"""A model made ready for work: loaded, settings decided, cast and placed. What every command needs first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpo import schedule
from dpo.common.errors import UserError
from dpo.models.denoiser import available_attention, fix_projections, use_attention, use_checkpointing
from dpo.models.family import Model
from dpo.models.load import load
from dpo.settings.config import Config, change
from dpo.settings.resolve import DeviceFacts, ModelFacts, resolve

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


WEIGHTS = {"bf16-pure": torch.bfloat16, "fp64": torch.float64}


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one. Raises UserError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu or install a CUDA build of torch")
    return torch.device(name)


def load_named(config: Config) -> Model:
    """The model that the settings name, as it is stored: fp32, on the CPU."""
    named = config.model
    return load(
        named.model,
        family=named.family,
        revision=named.revision,
        variant=named.variant,
        vae=named.vae,
        single_file_config=named.single_file_config,
        cache_dir=named.cache_dir,
    )


def load_model(config: Config, device: torch.device) -> tuple[Config, Model, schedule.Schedule, list[str]]:
    """The config with everything decided, weights on the CPU in fp32, the noise schedule, and what was decided, in words."""
    model = load_named(config)
    facts = ModelFacts(
        family=model.family.name,
        prediction_type=model.scheduler_config.get("prediction_type", "epsilon"),
        beta=model.family.beta,
        guidance=model.family.guidance,
        native_resolution=model.native_resolution,
        turbo=model.turbo,
        num_timesteps=model.scheduler_config.get("num_train_timesteps", 1000),
    )
    has = DeviceFacts(str(device), bf16=device.type != "cuda" or torch.cuda.is_bf16_supported())
    config, decided = resolve(config, facts, has)
    config = change(config, attention=available_attention(config.runtime.attention))  # said once, not for each UNet
    plan = schedule.from_scheduler(
        model.scheduler_config,
        prediction_type=config.model.prediction_type,
        turbo=config.model.timesteps == "turbo",
        zero_snr={"on": True, "off": False}.get(config.model.zero_snr),
    )
    model.prediction_type = plan.prediction_type
    return config, model, plan, decided


def cast(config: Config, model: Model) -> None:
    """Every module in the run's dtype: fp32 master weights for the UNet under autocast, half precision for what is only read.

    SDXL's VAE overflows in fp16 and stays in fp32 there.
    """
    precision = config.runtime.precision
    own = WEIGHTS.get(precision, torch.float32)
    read_only = HALF.get(precision, own)
    model.denoiser.to(own)
    model.vae.to(torch.float32 if precision == "fp16" and model.family.name == "sdxl" else read_only)
    for encoder in model.text_encoders:
        encoder.to(read_only)


def settle(config: Config, unet: nn.Module, device: torch.device) -> Any:
    """The same choices for policy and reference: device, layout, attention, checkpointing, kernels, compilation."""
    run = config.runtime
    unet.to(device)
    if run.channels_last == "on":
        unet.to(memory_format=torch.channels_last)
    fix_projections(unet)
    use_attention(unet, run.attention)
    use_checkpointing(unet, run.checkpointing)
    if run.kernels == "triton":
        from dpo.models import kernels

        kernels.patch(unet)
    return torch.compile(unet) if run.compile else unet

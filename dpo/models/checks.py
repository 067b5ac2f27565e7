"""What a model must be for the training step to fit it, asked of its configs and file headers before weights are read.

The step gives the denoiser latents [N, C, h, w] of the VAE, a timestep, the hidden states of the text encoders and what
the family adds; it scales latents by one number. A config that asks for more is refused here, in one line.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.common.errors import UserError
from dpo.common.words import brief

Config = Mapping[str, Any]
Configs = Mapping[str, Config]  # of every part of a pipeline, by its name: "unet", "vae", "text_encoder", ...
Check = Callable[[Configs], str | None]  # what is wrong, None where all is well

INPUTS = {  # channels that a UNet takes beyond the latents: what such a model is
    5: "an inpainting model: its UNet also takes a mask and a masked image",
    4: "an image-editing model (instruct-pix2pix): its UNet also takes an image",
    3: "an upscaler: its UNet also takes a small image",
    1: "a depth-to-image model: its UNet also takes a depth map",
}
LCM = "a distilled model (LCM): its UNet also takes the guidance scale"
PIPELINES = {  # words in the names of other pipelines: what such a model is
    "Inpaint": INPUTS[5],
    "Pix2Pix": INPUTS[4],
    "Upscale": INPUTS[3],
    "Depth2Img": INPUTS[1],
    "LatentConsistency": LCM,
    "FluxFill": "FLUX.1 Fill, for inpainting: its transformer also takes a mask and a masked image",
    "FluxControl": "FLUX.1 Depth or Canny, or made by one of their kind: its transformer also takes a control image",
    "FluxKontext": "FLUX.1 Kontext, for editing: its transformer also takes an image",
    "Flux2KleinKV": "FLUX.2 klein KV, for editing: its transformer keeps what it made of the images that it is given",
    "ImageEdit": "an image-editing model: its transformer also takes an image",
    "ImageLayered": "a layered model: it gives several images, one above the other",
}
REFINER = (
    "the SDXL refiner, which finishes images of the base model and has one of its text encoders: train the base model"
)
DEFAULTED = "_use_default_values"  # under which diffusers lists the keys that a config lacks
QUANTISED = ("I8", "U8", "F8", "F6", "F4")  # how the names of such dtypes begin in safetensors


def filled(cls: type, config: Config) -> dict[str, Any]:
    """`config` with the defaults that its own diffusers class declares; the keys it lacks are noted as diffusers does."""
    declared = inspect.signature(cls).parameters.values()
    defaults = {p.name: p.default for p in declared if p.default is not p.empty}
    return defaults | {DEFAULTED: sorted(defaults.keys() - config.keys())} | dict(config)


def notes(configs: Configs) -> list[str]:
    """Lines for the log on what the configs leave to the defaults of their classes and the training depends on."""
    if "scaling_factor" in configs["vae"].get(DEFAULTED, ()):
        return [f"the VAE's config has no scaling_factor: {configs['vae']['scaling_factor']}, the default of its class"]
    return []


def absent(part: str, key: str, meaning: str) -> Check:
    """A check that `key` of a part's config is not set: the training step has nothing to give for it."""
    return lambda configs: (
        f"the {part}'s config has {key} {brief(configs[part][key])}: {meaning}, which this trainer does not give it"
        if configs[part].get(key)
        else None
    )


def number(part: str, key: str, *, whole: bool = True) -> Check:
    """A check that `key` of a part's config is a number above 0."""

    def check(configs: Configs) -> str | None:
        value = configs[part].get(key)
        if isinstance(value, int if whole else (int, float)) and value > 0:
            return None
        return f"the {part}'s config has {key} {brief(value)}: a {'whole ' if whole else ''}number above 0 is expected"

    return check


def equal(part: str, key: str, wanted: str | int) -> Check:
    """A check that `key` of a part's config is `wanted`."""
    return lambda configs: (
        f"the {part}'s config has {key} {brief(configs[part].get(key))}: {wanted} is expected"
        if configs[part].get(key) != wanted
        else None
    )


def _quantised(configs: Configs) -> str | None:
    for part, config in configs.items():
        if (stored := config.get("quantization_config")) is not None:
            how = stored.get("quant_method", "") if isinstance(stored, Mapping) else ""
            return f"the {part}'s weights are quantised ({brief(how) or 'quantization_config'}, in its config): use a copy in fp32, bf16 or fp16"
    return None


def _latents(configs: Configs) -> str | None:
    unet, channels = configs["unet"], configs["vae"]["latent_channels"]
    if more := INPUTS.get(unet["in_channels"] - channels):
        return f"the model is {more} ({unet['in_channels']} channels), not a text-to-image model"
    if unet["in_channels"] != channels or unet["out_channels"] != channels:
        return (
            f"the UNet takes {unet['in_channels']} channels and gives {unet['out_channels']}, but the latents of the "
            f"VAE have {channels}: they are of different models"
        )
    return None


def _scaling(configs: Configs) -> str | None:
    vae = configs["vae"]
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    plain = all(isinstance(values, (list, tuple, type(None))) for values in (mean, std))
    if not plain or any(mean or ()) or any(value != 1 for value in std or ()):
        return "the VAE scales each channel of its latents (latents_mean, latents_std), not all by one scaling_factor"
    if vae.get("shift_factor"):
        return f"the VAE shifts its latents (shift_factor {brief(vae['shift_factor'])}): the family's pipelines do not"
    return None


def latents_match(denoiser: str) -> Check:
    """A check that a part of the pipeline takes and gives latents of as many channels as the VAE has."""

    def check(configs: Configs) -> str | None:
        taken, channels = configs[denoiser]["in_channels"], configs["vae"]["latent_channels"]
        given = configs[denoiser].get("out_channels") or taken
        if taken == given == channels:
            return None
        return (
            f"the {denoiser} takes {taken} channels and gives {given}, but the latents of the VAE have {channels}: they are "
            "of different models"
        )

    return check


def text_width(*parts: str) -> Check:
    """A check that the UNet takes hidden states as wide as those of the text encoders `parts` side by side."""

    def check(configs: Configs) -> str | None:
        widths = [configs[part]["hidden_size"] for part in parts]
        wanted = configs["unet"]["cross_attention_dim"]
        wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        if all(isinstance(width, int) for width in widths) and wanted and set(map(str, wanted)) == {str(sum(widths))}:
            return None
        have = brief(" + ".join(map(str, widths)))
        takes = brief(", ".join(sorted(set(map(str, wanted)))))
        of = " and ".join(parts) + (" give" if len(parts) > 1 else " gives")
        return f"the UNet takes text of width {takes}, but {of} {have}: they are of different models"

    return check


def scaling_said(configs: Configs) -> str | None:
    """A check for families whose VAE's scale is not the one that diffusers' class declares, SD's 0.18215."""
    if "scaling_factor" in configs["vae"].get(DEFAULTED, ()):
        return "the vae's config has no scaling_factor: add the one that the model was trained with"
    return None


UNET: tuple[Check, ...] = (  # of every family with a UNet
    number("unet", "sample_size"),
    number("unet", "in_channels"),
    number("unet", "out_channels"),
    number("vae", "latent_channels"),
    number("vae", "scaling_factor", whole=False),
    _latents,
    _scaling,
    absent("unet", "time_cond_proj_dim", "the UNet of a distilled model (LCM) takes its guidance scale as an input"),
    absent("unet", "class_embed_type", "the UNet takes class labels"),
    absent("unet", "num_class_embeds", "the UNet takes class labels, or a noise level as upscalers do"),
    absent("unet", "encoder_hid_dim", "the UNet takes other embeddings than the text's"),
    absent("unet", "encoder_hid_dim_type", "the UNet takes other embeddings than the text's"),
)


def check(checks: Iterable[Check], configs: Configs, source: str) -> None:
    """Raises UserError, which begins with `source`, for the first check that finds something wrong."""
    if wrong := next((said for ask in (_quantised, *checks) if (said := ask(configs))), None):
        raise UserError(f"{source} cannot be trained: {wrong}")


def finite(module: nn.Module | Mapping[str, Tensor], said: str) -> None:
    """Raises UserError, which begins with `said`, for a tensor with NaN or infinity, whose name it says."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    for name, value in state.items():
        # a sum is finite only where every term is, and needs no copy; it may overflow by itself, so look again
        if value.is_floating_point() and not math.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise UserError(f"{said} has NaN or infinity in {name}: the file is damaged; use another one")


def stored_dtypes(path: Path) -> set[str]:
    """The names of the dtypes of the numbers in a .safetensors file, as its header has them; none of one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError):
        return set()


def check_stored(path: Path) -> None:
    """Raises UserError for a .safetensors file of quantised weights: without their scales they mean nothing.

    Reads the header alone. A file that cannot be read is left to the loader.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                stored = file.get_slice(name)
                if stored.get_dtype().startswith(QUANTISED) and math.prod(stored.get_shape()) > 1:
                    coded = f"{name} as {stored.get_dtype()}"
                    raise UserError(f"{path} holds quantised weights ({coded}): use a file in fp32, bf16 or fp16")
    except (SafetensorError, OSError):
        return

"""One module of a pipeline, read from safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpo.common.errors import UserError
from dpo.common.words import first_line


def is_turbo(source: str, scheduler_config: dict) -> bool:
    """Whether a model is distilled to four steps, by its name or by the published Turbo models' scheduler.

    That scheduler is Euler-ancestral with trailing timesteps.
    """
    named = "turbo" in Path(source).name.lower()
    euler = scheduler_config.get("_class_name") == "EulerAncestralDiscreteScheduler"
    return named or (euler and scheduler_config.get("timestep_spacing") == "trailing")


def _advice(place: Path, variant: str | None) -> str:
    """The end of the message on a module that cannot be loaded from `place`: what to do, by the files that it has."""
    if variant is not None:
        return f"; if it has no files of variant {variant}, leave out --variant"
    if any(place.glob("*.fp16*.safetensors")):
        return "; its weights are stored in half precision: use --variant fp16"
    if any(place.glob("*.safetensors")) or (place.is_dir() and not any(place.glob("*.bin"))):
        return "; fetch the model again"
    return "; only safetensors are read: convert the weights" if place.is_dir() else ""


def component(cls: Any, folder: Path | str, subfolder: str | None, variant: str | None = None) -> Any:
    """One module of a diffusers or transformers class, from safetensors, in fp32, frozen, in eval mode.

    Raises UserError when it cannot be loaded or lacks weights.
    """
    options: dict[str, Any] = {"use_safetensors": True, "variant": variant, "local_files_only": Path(folder).is_dir()}
    if subfolder:
        options["subfolder"] = subfolder
    options["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = torch.float32
    place = f"{folder}/{subfolder}" if subfolder else str(folder)
    try:
        module, report = cls.from_pretrained(str(folder), **options, output_loading_info=True)
    except Exception as error:  # missing, truncated, pickled-only or mismatched weights come as many kinds
        raise UserError(
            f"cannot load {place}: {first_line(error).rstrip('.')}{_advice(Path(place), variant)}"
        ) from error
    if absent := sorted(report["missing_keys"]):  # the libraries would fill them with random numbers
        raise UserError(
            f"{place} lacks {len(absent)} weights ({absent[0]}, ...): the file is incomplete; fetch the model again"
        )
    return module.requires_grad_(False).eval()


def vae_subfolder(vae: str) -> str | None:
    """ "vae" when the named folder is a whole pipeline, None when it is the VAE itself."""
    return "vae" if (Path(vae) / "vae").is_dir() else None

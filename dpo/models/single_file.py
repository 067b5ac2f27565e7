"""Loading a single .safetensors checkpoint in the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.models.family import Family, Model, families
from dpo.models.parts import is_turbo, other_vae, pipeline_settings


def family_by_keys(names: set[str]) -> Family:
    """The last, most special family with a key among the `names` of a checkpoint in the original layout."""
    return next(
        family
        for family in reversed(families().values())
        if any(name.startswith(family.single_file_key) for name in names)
    )


def load_single_file(path: Path, family: str, config: str | None, vae: str | None, cache_dir: str | None) -> Model:
    """Loads one .safetensors checkpoint in the original layout: fp32 on the CPU, frozen, in eval mode.

    family: a name or "auto"; config: a diffusers folder that describes the file, else the hub's; vae: another VAE;
    cache_dir: where files of the hub are kept.
    Raises UserError.
    """
    import diffusers
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise UserError(
            f"{path} is not a whole Stable Diffusion checkpoint; to start from its UNet alone use --unet-init"
        )
    kind = family_by_keys(names) if family == "auto" else families()[family]
    options: dict[str, Any] = (
        {"config": config, **kind.single_file_options} if config else dict(kind.single_file_options)
    )
    try:
        pipe = getattr(diffusers, kind.pipeline).from_single_file(
            str(path), torch_dtype=torch.float32, cache_dir=cache_dir, **options
        )
    except Exception as error:
        raise UserError(
            f"cannot read {path} as {kind.pipeline} ({first_line(error)}); its configuration comes from the hub unless "
            "--single-file-config names a diffusers folder of the same architecture"
        ) from error
    encoders = [getattr(pipe, name) for name, _ in kind.text_encoders]
    own_vae = other_vae(vae, pipe.vae.config, cache_dir) if vae else pipe.vae
    scheduler_config = dict(pipe.scheduler.config)
    return Model(
        family=kind,
        denoiser=getattr(pipe, kind.denoiser).requires_grad_(False).eval(),
        vae=own_vae.requires_grad_(False).eval(),
        text_encoders=[encoder.requires_grad_(False).eval() for encoder in encoders],
        tokenizers=[getattr(pipe, name) for name in kind.tokenizers],
        scheduler_config=scheduler_config,
        source=str(path),
        folder=None,
        turbo=is_turbo(str(path), scheduler_config),
        pipeline_config=pipeline_settings(pipe.config),
    )

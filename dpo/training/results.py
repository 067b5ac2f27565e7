"""The result of a run: the aligned model on disk, and on the hub."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from dpo.common.words import first_line
from dpo.models.family import Denoiser, Model
from dpo.models.ready import load_named
from dpo.models.save import detached, save_lora, save_pipeline
from dpo.pages.folder import ENTRIES
from dpo.training.run import Run

log = logging.getLogger("dpo")


NOT_UPLOADED = [*(f"{entry.name}/**" for entry in ENTRIES if not entry.uploaded), ".*"]


def write(run: Run) -> Denoiser:
    """Writes the result in diffusers layout.

    Returns its denoiser: a copy on the CPU, with the averaged weights if any.
    """
    weights = dict(zip(run.updater.names, run.updater.ema, strict=True)) if run.updater.ema else None
    denoiser = detached(run.model.denoiser, weights)
    if run.config.lora.lora:
        save_lora(run.model, denoiser, run.output, layout=run.config.lora.lora_format)
    else:
        save_pipeline(_untouched(run), denoiser, run.output)
    return denoiser


def upload(run: Run) -> None:
    """Uploads the run folder to the hub, without checkpoints; a failure is one warning that says how to do it later."""
    import huggingface_hub

    name = run.config.output.hub_id or run.output.resolve().name
    try:
        hub = huggingface_hub.HfApi()
        name = hub.create_repo(name, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=run.output, ignore_patterns=NOT_UPLOADED)
    except Exception as error:  # the hub client raises a dozen kinds: offline, not logged in, no right to the name
        reason = first_line(error).rstrip(".")
        log.warning(
            "not uploaded to the hub (%s); later: hf upload %s %s --exclude 'checkpoints/**'", reason, name, run.output
        )
        return
    log.info("uploaded: https://huggingface.co/%s", name)


def _untouched(run: Run) -> Model:
    """The model with its components in fp32: in half precision the run's text encoders and VAE are rounded."""
    if run.model.vae.dtype == torch.float32:
        return run.model
    return replace(load_named(run.config), scheduler_config=run.model.scheduler_config)

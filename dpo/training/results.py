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


def write(run: Run) -> None:
    """Writes the result in diffusers layout: a whole pipeline, or an adapter, of which nothing else is touched."""
    if run.config.lora.lora:
        with run.updater.averaged():
            save_lora(run.model, run.model.denoiser, run.output, layout=run.config.lora.lora_format)
    else:
        save_pipeline(_untouched(run), trained(run), run.output)


def trained(run: Run) -> Denoiser:
    """The denoiser that is the result: on the CPU in fp32, with the averaged weights if any."""
    weights = dict(zip(run.updater.names, run.updater.ema, strict=True)) if run.updater.ema else None
    return detached(run.model.denoiser, weights)


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
    own = run.model  # its denoiser stands here for the one that was just read, which is not kept
    return replace(load_named(run.config), denoiser=own.denoiser, scheduler_config=own.scheduler_config)

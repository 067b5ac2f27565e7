"""The two ends of a run: what is noted before the first update, and the weights written after the last."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from dpo.common.errors import Stopped
from dpo.common.words import first_line
from dpo.models.ready import load_named
from dpo.models.save import detached, save_lora, save_pipeline
from dpo.pages.folder import ENTRIES
from dpo.tiny import outcome
from dpo.training.run import Run
from dpo.training.samples import _before_paths, _sample, sample_images
from dpo.training.summary import device_name, report
from dpo.training.trackers import Trackers

log = logging.getLogger("dpo")


NOT_UPLOADED = [*(f"{entry.name}/**" for entry in ENTRIES if not entry.uploaded), ".*"]


def begin(run: Run, trackers: Trackers) -> None:
    """Draw the images of the unchanged model (once per run folder) and note what starts."""
    trackers.event({"event": "started", "step": run.done, "total": run.total, "device": device_name(run.device)})
    run.started = time.time()
    if run.done == 0:
        for path, image in zip(_before_paths(run), _sample(run), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def end(run: Run, trackers: Trackers) -> None:
    """Write the result in diffusers layout, the images, and all that tells how the run went."""
    weights = dict(zip(run.updater.names, run.updater.ema, strict=True)) if run.updater.ema else None
    unet = detached(run.model.denoiser, weights)
    if run.config.lora.lora:
        save_lora(run.model, unet, run.output, layout=run.config.lora.lora_format)
    else:
        save_pipeline(_untouched(run), unet, run.output)
    sample_images(run)
    try:
        if run.config.output.judge and outcome.is_embedded(run.model):
            run.evaluation = outcome.judged(unet, run.device)
            trackers.event({"event": "judged", "step": run.done, **run.evaluation})
    except KeyboardInterrupt:
        report(run, "interrupted", "stopped while judging")
        log.warning("judging was cut short; the aligned model in %s is whole", run.output)
        log.warning("judge it with: python -m dpo.train --output %s --resume latest", run.output)
        raise Stopped from None
    report(run, "finished")
    if run.config.output.push_to_hub:
        _upload(run)
    log.info("done: %s", run.output)


def _upload(run: Run) -> None:
    """The run folder without its checkpoints to the hub; where that fails, one warning that says how to do it later."""
    import huggingface_hub

    name = run.config.output.hub_id or run.output.resolve().name
    try:
        hub = huggingface_hub.HfApi()
        name = hub.create_repo(name, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=run.output, ignore_patterns=NOT_UPLOADED)
    except Exception as error:  # the hub client raises a dozen kinds: offline, not logged in, no right to the name
        reason = first_line(error).rstrip(".")
        log.warning("not uploaded to the hub (%s); later: hf upload %s %s --exclude 'checkpoints/**'", reason, name, run.output)
        return
    log.info("uploaded: https://huggingface.co/%s", name)


def _untouched(run: Run) -> Any:
    """The components as they were loaded: in half precision the run's own text encoders and VAE are rounded copies."""
    if next(run.model.vae.parameters()).dtype == torch.float32:
        return run.model
    return load_named(run.config)

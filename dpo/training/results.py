"""The result of a run: the aligned model on disk, and on the hub."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dpo.common.words import first_line
from dpo.models.family import Denoiser, Model
from dpo.models.ready import load_named
from dpo.models.save import detached, save_lora, save_pipeline
from dpo.pages.folder import own_files
from dpo.settings.config import Output
from dpo.training.published import published
from dpo.training.run import Run

log = logging.getLogger("dpo")


def write(run: Run) -> list[str]:
    """Writes the result in diffusers layout: a whole pipeline, or an adapter, of which nothing else is touched.

    Returns the names of its files, relative to the output folder.
    """
    if run.config.lora.lora:
        with run.updater.averaged():
            return save_lora(run.model, run.model.denoiser, run.output, layout=run.config.lora.lora_format)
    return save_pipeline(_untouched(run), trained(run), run.output)


def trained(run: Run) -> Denoiser:
    """The denoiser that is the result: on the CPU in fp32, with the averaged weights if any."""
    if run.updater.shards is not None:
        assert run.whole_weights is not None, "gathered by all processes before one of them writes"
        return detached(run.updater.shards.alone(run.whole_weights))
    weights = dict(zip(run.updater.names, run.updater.ema, strict=True)) if run.updater.ema else None
    return detached(run.model.denoiser, weights)


def upload(output: Path, out: Output, written: Sequence[str]) -> None:
    """Uploads the result and the run's records, pages and images to the hub, file by file, and nothing else.

    written: the result's files, as `write` names them. Texts go without the places of the user's files. The log lists
    all names first. A new repository is private
    unless --hub-public is given; one that exists keeps who may see it. A failure is one warning that says how to do it
    later.
    """
    import huggingface_hub

    name = out.hub_id or output.resolve().name
    names = [*written, *own_files(output)]
    try:
        hub = huggingface_hub.HfApi()
        name = hub.create_repo(name, private=not out.hub_public, exist_ok=True).repo_id
        private = bool(hub.model_info(name).private)
        if private == out.hub_public:
            log.warning("%s was there before and stays %s", name, "private" if private else "public: all see the files")
        log.info("to the hub, %s (%s): %s", name, "private" if private else "public", ", ".join(names))
        files = [huggingface_hub.CommitOperationAdd(file, published(output, file)) for file in names]
        hub.create_commit(name, files, commit_message="The result of a run")
    except Exception as error:  # the hub client raises a dozen kinds: offline, not logged in, no right to the name
        reason = first_line(error).rstrip(".")
        log.warning("not uploaded to the hub (%s); later: %s", reason, _later(output, out))
        return
    log.info("uploaded: https://huggingface.co/%s", name)


def _later(output: Path, out: Output) -> str:
    """The command that uploads the finished run: it trains nothing, and takes the same files."""
    public, named = ["--hub-public"] * out.hub_public, ["--hub-id", out.hub_id] if out.hub_id else []
    words = ["python", "-m", "dpo.train", "--output", str(output), "--resume", "latest", "--push-to-hub"]
    return shlex.join([*words, *public, *named])


def _untouched(run: Run) -> Model:
    """The model with its components in fp32: in half precision the run's text encoders and VAE are rounded."""
    own = run.model
    parts = own.vae, *own.text_encoders  # the VAE may have a precision of its own
    if all(part.dtype == torch.float32 for part in parts):
        return own
    # its denoiser stands here for the one that was just read, which is not kept
    return replace(load_named(run.config), denoiser=own.denoiser, scheduler_config=own.scheduler_config)

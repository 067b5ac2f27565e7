"""The two ends of a run: what is drawn before the first update, and the result, card, plots and report after the last."""

from __future__ import annotations

import json
import logging
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpo import checkpoint, decisions, drawing, outcome
from dpo.build import load_named
from dpo.config import Config
from dpo.errors import Stopped, UserError
from dpo.models.load import first_line
from dpo.models.save import detached, save_lora, save_pipeline
from dpo.run import Run
from dpo.trackers import Trackers

log = logging.getLogger("dpo")
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
DEFAULT_PROMPTS = 4
NOT_UPLOADED = ["checkpoints/**", "tensorboard/**", "wandb/**", ".*"]


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
    unet = detached(run.model.unet, weights)
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


def asked_prompts(config: Config) -> list[str]:
    """The prompts that --sample-prompts names, one by one or in a .txt file. UserError when the file gives none."""
    asked = config.output.sample_prompts
    if len(asked) != 1 or not asked[0].endswith(".txt"):
        return list(asked)
    try:
        lines = Path(asked[0]).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample-prompts {asked[0]}: cannot be read ({error}); name a file with one prompt a line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--sample-prompts {asked[0]}: has no prompt; write one a line")
    return found


def prompts(run: Run) -> list[str]:
    """The prompts of the sample grid: as asked for, else the first captions of the held-out pairs, else of the training pairs."""
    if asked := asked_prompts(run.config):
        return asked
    source = run.held_out_source or run.source
    captions = (source[index].caption for index in range(min(len(source), 8 * DEFAULT_PROMPTS)))
    return list(dict.fromkeys(captions))[:DEFAULT_PROMPTS]


def _before_paths(run: Run) -> list[Path]:
    count = len(prompts(run)) * len(run.config.output.sample_seeds)
    return [run.output / "samples" / "before" / f"{index:03d}.png" for index in range(count)]


def _sample(run: Run) -> list[Image.Image]:
    out = run.config.output
    pipe = drawing.pipeline(run.model)
    return drawing.sample(
        pipe, prompts(run), out.sample_seeds, steps=out.sample_steps, guidance=out.sample_guidance, autocast=run.step.autocast
    )


def sample_images(run: Run) -> Path:
    """Draw the fixed prompts with the policy as it is, beside the unchanged model's images, as a PNG grid."""
    columns = {"after": _sample(run)}
    if all(path.exists() for path in _before_paths(run)):
        columns = {"before": [Image.open(path).convert("RGB") for path in _before_paths(run)], **columns}
    return drawing.write_grid(
        run.output / "samples" / f"step-{run.done:08d}.png", prompts(run), run.config.output.sample_seeds, columns
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report(run: Run, status: str, reason: str = "") -> None:
    """summary.json, tables.json, plots, model card and report.html of the run folder, for a whole run or a broken-off one."""
    from dpo import model_card, plots
    from dpo import report as report_page

    model = run.model
    trained = sum(p.numel() for p in run.updater.parameters)
    summary = {
        "status": status,
        "reason": reason,
        "steps": run.total,
        "seconds": time.time() - run.started,
        "device": device_name(run.device),
        "versions": versions(),
        "model": {
            "source": model.source,
            "family": model.family.name,
            "prediction type": model.prediction_type,
            "parameters": sum(p.numel() for p in model.unet.parameters()),
            "trained parameters": trained,
        },
        "data": run.source.summary | {"usable": len(run.source)},
        "resolved": {
            "beta": run.config.method.beta,
            "learning_rate": decisions.learning_rate(run.config),
            "effective_batch": run.nominal,
        },
        "evaluation": run.evaluation,
        "warnings": decisions.warnings(run.config),
    }
    tables = {
        "weight": run.step.weight,
        "precision": run.table.precision,
        "table": run.table.table,
        "correction": run.table.correction(),
    }
    checkpoint.write_text(run.output / "summary.json", json.dumps(summary, indent=1))
    checkpoint.write_text(run.output / "tables.json", json.dumps({name: value.tolist() for name, value in tables.items()}))
    plots.write_plots(run.output)
    if run.config.output.model_card and status == "finished":
        model_card.write_model_card(run.output)
    log.info("report: %s", report_page.write_report(run.output))

"""The two ends of a run: what is drawn and written before the first update, and the result, card, plots and report after the last."""

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
from dpo.build import Run
from dpo.models.load import load
from dpo.models.save import detached, save_lora, save_pipeline
from dpo.trackers import Trackers

log = logging.getLogger("dpo")
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")
DEFAULT_PROMPTS = 4


def begin(run: Run, trackers: Trackers) -> None:
    """Draw the images of the unchanged model (once per run folder) and note what starts."""
    trackers.event({"event": "started", "step": run.done, "total": run.total, "device": device_name(run.device)})
    run.started = time.time()
    if run.done == 0 and not _before_paths(run)[0].exists():
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
    if outcome.is_embedded(run.model):
        run.evaluation = outcome.judged(run.model, unet, run.device)
        trackers.event({"event": "judged", "step": run.done, **run.evaluation})
    report(run, "finished")
    log.info("done: %s", run.output)


def _untouched(run: Run) -> Any:
    """The components as they were loaded: in half precision the run's own text encoders and VAE are rounded copies."""
    if next(run.model.vae.parameters()).dtype == torch.float32:
        return run.model
    named = run.config.model
    return load(
        named.model,
        family=named.family,
        revision=named.revision,
        variant=named.variant,
        vae=named.vae,
        single_file_config=named.single_file_config,
        cache_dir=named.cache_dir,
    )


def prompts(run: Run) -> list[str]:
    """The prompts of the sample grid: as asked for, else the first captions of the held-out pairs, else of the training pairs."""
    asked = run.config.output.sample_prompts
    if len(asked) == 1 and asked[0].endswith(".txt"):
        return [line.strip() for line in Path(asked[0]).read_text("utf-8").splitlines() if line.strip()]
    if asked:
        return list(asked)
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

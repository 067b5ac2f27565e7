"""summary.json and tables.json, and the pages made from them; the event of a start, which they read too."""

from __future__ import annotations

import json
import logging
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo.common import files
from dpo.data.pairs import Source
from dpo.models.ready import WEIGHTS
from dpo.pages.began import MADE_FROM
from dpo.pages.folder import SHARED, SUMMARY_FILE, TABLES_FILE, read_json, read_run
from dpo.pages.single import HELD_LIKED, LIKED
from dpo.pages.standing import RESULT, result_of
from dpo.settings import advice, resolve
from dpo.training import choice, outset
from dpo.training.run import Figures, Run

log = logging.getLogger("dpo")


PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def begun(run: Run) -> Figures:
    """The event of a start: with its labels' loss and pull before the first update, unless nothing is trained any more."""
    told = {"event": "started", "step": run.done, "total": run.total, "device": device_name(run.device)}
    start = None if run.complete else outset.start_of(run.config, run.source)
    return told if start is None else told | {"start_loss": start.loss, "start_pull": start.pull}


def report(run: Run, status: str, reason: str = "") -> None:
    """Writes summary.json, tables.json, plots, model card and report.html into the run folder.

    status: "finished", "interrupted" or "failed"; reason: one line for the last two. Only a finished run gets a model
    card.
    """
    model = run.model
    trained = sum(p.numel() for p in model.denoiser.parameters() if p.requires_grad)
    summary = {
        "status": status,
        "reason": reason,
        "steps": run.done if run.ended else run.total,
        "done": run.done,
        "taken": run.position,
        "kept": choice.told(run),
        RESULT: result_of(read_json(run.output / SUMMARY_FILE)) or None,
        "seconds": time.time() - run.started,
        "processes": run.processes.count,
        "device": device_name(run.device),
        "versions": versions(),
        "model": {
            "source": model.source,
            "family": model.family.name,
            "prediction type": model.prediction_type,
            "parameters": sum(p.numel() for p in model.denoiser.parameters()),
            "trained parameters": trained,
        },
        "made_from": _made_from(run),
        "scheduler": model.resampled,
        "absent": {
            name: None for name, one in (model.named_encoders() | model.named_tokenizers()).items() if one is None
        },
        "data": run.source.summary | {"usable": len(run.source)} | _liked(run.source, LIKED) | _held_out(run),
        "resolved": {
            "beta": run.config.method.beta,
            "learning_rate": resolve.learning_rate(run.config),
            "effective_batch": run.nominal,
        },
        "evaluation": {},
        "warnings": [
            *advice.warnings(run.config, run.things),
            *advice.too_long(run.config, len(run.source), run.things),
        ],
    }
    tables = {
        "weight": run.step.weight,
        "precision": run.table.precision,
        "table": run.table.table,
        "correction": run.table.correction(),
    }
    if run.complete:
        summary = _as_trained(run, summary)
    files.write_text(run.output / SUMMARY_FILE, json.dumps(summary, indent=1))
    if not (run.complete and (run.output / TABLES_FILE).is_file()):
        files.write_text(run.output / TABLES_FILE, json.dumps({name: value.tolist() for name, value in tables.items()}))
    _write_pages(run.output, run.config.output.model_card and status == "finished")


def note_result(run: Run) -> None:
    """Puts into the summary of which update the result that was just written is: it is so though the process end before `report`."""
    said = {"step": run.done if run.shown is None else run.shown, "of": run.done}
    summary = read_json(run.output / SUMMARY_FILE) | {RESULT: said}
    files.write_text(run.output / SUMMARY_FILE, json.dumps(summary, indent=1))


def _held_out(run: Run) -> dict[str, int]:
    """How many pairs are held out and, where captions of theirs are trained on too, how many of them."""
    if run.held_out_source is None:
        return {"held out": 0}
    keys = run.held_out_source.caption_keys()
    shared = int(np.isin(keys, run.source.caption_keys()).sum())
    return {"held out": len(keys)} | ({SHARED: shared} if shared else {}) | _liked(run.held_out_source, HELD_LIKED)


def _liked(source: Source, name: str) -> dict[str, int]:
    """How many images without a partner are liked; nothing of pairs."""
    return {name: int(np.sum(source.prob > 0.5))} if source.sides == 1 else {}


def _made_from(run: Run) -> dict[str, str]:
    """Checksums of the files that the run began with, by name: who draws its start later compares them.

    A start that was rounded to the precision of training (bf16-pure) is none of a file's, so it is left out.
    """
    found = {name: run.fingerprints.get(f"{name}_checksum") for name in MADE_FROM}
    if run.config.runtime.precision in WEIGHTS:
        found["start"] = None
    return {name: value for name, value in found.items() if value is not None}


def conclude(output: Path, evaluation: Figures, model_card: bool) -> None:
    """Puts the comparison with the start into the summary that `report` wrote, and makes the run a finished one.

    An empty comparison leaves what was there.
    """
    summary = read_run(output).summary | {"status": "finished", "reason": ""}
    summary |= {"evaluation": evaluation} if evaluation else {}
    files.write_text(output / SUMMARY_FILE, json.dumps(summary, indent=1))
    _write_pages(output, model_card, plotted=True)


def _write_pages(output: Path, model_card: bool, plotted: bool = False) -> None:
    """plotted: whether the plots are there, which show the updates alone."""
    from dpo.pages import card, plots, report

    if not plotted:
        plots.write_plots(output)
    if model_card:
        card.write_model_card(output)
    log.info("report: %s", report.write_report(output))


def _as_trained(run: Run, now: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that this process found complete: what its training left, and how it stands now."""
    before = read_run(run.output).summary
    new = {"status", "reason", "steps"} | ({"kept"} if now["kept"] is None else set())
    return now | {name: before[name] for name in now if name in before and name not in new}

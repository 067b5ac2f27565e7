"""Run folders that look like real ones, for the tests of plots, report, verdict and model card.

write_run(folder, "good")        see KINDS for the others; `python -m tests.help.fake_run FOLDER` writes one of each
kind
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dpo.common.stats import share_interval
from dpo.correction import correction
from dpo.credit import tables
from dpo.drawing.grid import write_grid
from dpo.methods import METHODS
from dpo.pages.folder import RunFolder, read_run
from dpo.schedule import from_scheduler
from dpo.settings.config import Config, change, to_toml
from dpo.training.metrics import StepMetrics
from dpo.training.trackers import open_trackers
from tests.help.oracle import pair_terms

KINDS = ("good", "dde", "lora-gpu", "early", "failed", "sft", "over", "flat")


SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE |= {"prediction_type": "epsilon"}


PROMPTS = ("a frog on a purple background", 'a <b>cake</b> & a "quoted" cup', "a very long prompt " * 12)


def write_run(folder: Path, kind: str = "good", updates: int = 120, batch: int = 32) -> Path:
    """Write a run folder of the given kind with made-up but coherent figures; a pure function of its arguments."""
    config = _config(kind, updates, batch)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    last = {"early": 6, "failed": updates // 2}.get(kind, updates)
    found = _metrics(folder, kind, config, last, updates)
    if kind != "early":
        (folder / "summary.json").write_text(json.dumps(_summary(kind, config, last, updates)), encoding="utf-8")
        (folder / "tables.json").write_text(json.dumps(found), encoding="utf-8")
        _grid(folder / "samples" / f"step-{last:08d}.png")
    return folder


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dpo-fake-runs-")


@functools.cache
def run_of(kind: str) -> RunFolder:
    """A run of 60 updates of this kind, made once per process: read it, do not write into its folder."""
    return read_run(write_run(Path(_root().name) / kind, kind, updates=60))


def _config(kind: str, updates: int, batch: int) -> Config:
    method = {"dde": "dde", "sft": "sft"}.get(kind, "dpo")
    values = {
        "method": method,
        "steps": updates,
        "batch_size": batch,
        "output": "runs/" + kind,
        "beta": 2000.0,
        "warmup": 5,
    }
    if kind == "dde":
        values["beta"] = 200.0
    if kind == "lora-gpu":
        values |= {
            "lora": True,
            "rank": 16,
            "model": "stabilityai/stable-diffusion-xl-base-1.0",
            "data": "owner/pick-a-pic",
            "learning_rate": 1e-4,
        }
    if kind == "flat":
        values |= {"learning_rate": 2.048e-8}
    return change(Config(), **values)


def _metrics(folder: Path, kind: str, config: Config, last: int, updates: int) -> dict[str, list[float]]:
    """metrics.jsonl, computed by the trainer's own functions from made-up errors."""
    rng = np.random.default_rng(KINDS.index(kind))
    tabled = tables(config.method.method, from_scheduler(SCHEDULE))
    table = torch.zeros(1000, dtype=torch.float64)
    drift = {"over": 4e-3, "flat": 0.0}.get(kind, 0.0)
    speed = {"lora-gpu": 3.1}.get(kind, 6.4)
    trackers = open_trackers(folder)
    for update in range(1, last + 1):
        grown = 0.0 if kind == "flat" else 1 - math.exp(-update / (updates / 3))
        batch = config.optim.batch_size
        t = torch.from_numpy(rng.integers(0, 1000, batch))
        base = 0.02 + 0.25 * np.exp(-t.numpy() / 250)
        reference = base * rng.lognormal(0, 0.15, (2, batch))
        bump = np.exp(-(((t.numpy() - 450) / 300) ** 2))
        gain = (4e-4 * grown * bump + rng.normal(0, 6e-4 * grown + 1e-9, batch)) * (0.05 if kind == "dde" else 1)
        policy = reference + np.stack([-0.4 * gain, 0.6 * gain]) + drift * grown
        errors = torch.from_numpy(np.concatenate([policy, reference]))
        now = correction(table, tabled.precision)
        prob, usable = torch.ones(batch, dtype=torch.float64), torch.ones(batch, dtype=torch.float64)
        terms = pair_terms(errors, t, prob, tabled.weight, now, float(config.method.beta or 1.0))
        if METHODS[config.method.method].images == "winner":
            terms = terms._replace(loss=errors[0], logit=errors[0] * math.nan, difference=errors[0] * math.nan)
        metrics = StepMetrics(SCHEDULE["num_train_timesteps"])
        metrics.add(terms, prob, usable)
        norm = torch.tensor(0.02 * rng.lognormal(0, 0.3))
        shown = {"table": table, "correction": now} if METHODS[config.method.method].correction else {}
        figures = metrics.read({"grad_norm": norm}, shown)
        if kind == "failed" and update == last:
            figures["loss"] = math.nan
        table[t] = 0.95 * table[t] + 0.05 * terms.difference
        figures["learning_rate"] = config.optim.learning_rate * min(1.0, update / 5)
        figures["pairs_per_s"] = speed * rng.normal(1, 0.03) * (0.6 if update == 1 else 1)
        figures |= {"tflops": 290.0, "mfu": 0.293} if kind == "lora-gpu" else {"tflops": 0.02, "mfu": None}
        figures["peak_memory_gib"] = 31.4 if kind == "lora-gpu" else 1.2
        trackers.log(update, figures)
        if update % max(1, updates // 6) == 0 and kind != "sft":
            share = 0.5 + (0.0 if kind == "flat" else 0.14 * grown)
            count = 256
            event = {"event": "validation", "step": update, "heldout_accuracy": share, "heldout_pairs": count}
            trackers.event(
                {**event, "heldout_interval": list(share_interval(share * count, count)), "heldout_difference": -1e-4}
            )
    trackers.close()
    found = {
        "weight": tabled.weight,
        "precision": tabled.precision,
        "table": table,
        "correction": correction(table, tabled.precision),
    }
    return {name: values.tolist() for name, values in found.items()}


def _summary(kind: str, config: Config, last: int, updates: int) -> dict:
    gpu = kind == "lora-gpu"
    found = {
        "status": "failed" if kind == "failed" else "finished",
        "steps": updates,
        "seconds": last * (9.7 if gpu else 1.1),
        "started": "2026-11-21T08:00:00+00:00",
        "device": "NVIDIA H200" if gpu else "CPU, 2 threads",
        "versions": {"dpo": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
        "model": {
            "family": "sdxl" if gpu else "sd",
            "prediction type": "epsilon",
            "trainable parameters": 23_224_320 if gpu else 3_812_004,
        },
        "data": {"rows": 1000, "ties dropped": 150, "unlabelled": 50, "usable": 800},
        "notes": ["decided: precision bf16, optimizer adamw8bit"] if gpu else [],
        "warnings": [],
    }
    if kind == "failed":
        found["reason"] = f"the loss is not finite at update {last} (timesteps 12, 503)"
    if kind in ("good", "dde", "over", "flat"):
        share = {"flat": 0.5, "over": 0.73}.get(kind, 0.82)
        found["evaluation"] = {
            "win_rate": share,
            "win_rate_interval": list(share_interval(share * 208, 208)),
            "prompts": 208,
            "judge": "second judge, unseen prompts",
            "faithfulness_before": 0.99,
            "faithfulness_after": {"over": 0.62, "flat": 0.99}.get(kind, 0.97),
        }
    return found


def _picture(seed: int, after: bool) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (64, 64), tuple(int(value) for value in rng.integers(90, 220, 3)))
    pen = ImageDraw.Draw(image)
    if not after:
        for line in range(0, 64, 8):
            pen.line([(0, line), (64, line)], fill="white", width=2)
    size = 26 if after else 16
    pen.ellipse(
        [32 - size, 32 - size, 32 + size, 32 + size], fill=tuple(int(value) for value in rng.integers(0, 255, 3))
    )
    return image


def _grid(path: Path) -> None:
    seeds = [0, 1]
    places = [(row, seed) for row in range(len(PROMPTS)) for seed in seeds]
    before = [_picture(10 * row + seed, False) for row, seed in places]
    after = [_picture(10 * row + seed, True) for row, seed in places]
    write_grid(path, PROMPTS, seeds, {"before": before, "after": after})


if __name__ == "__main__":
    for each in KINDS:
        write_run(Path(sys.argv[1]) / each, each)

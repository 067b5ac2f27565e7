"""How near a plan is to the step: bytes at the peak against those that torch's allocator reports, and counted FLOPs.

    python -m benchmarks.plan [--size tiny|mid|sd15 ...] [--out FOLDER]

Each row plans a run and trains two updates of it on the CPU. "measured" is what the run held before its second update
and what the allocator then gave out, workspaces inside operations included; "planned / measured" is 1 where the plan is
exact. FLOPs are counted in the third update by torch's own counter. tiny is the embedded world, mid a random pipeline at
256 pixels, sd15 Stable Diffusion 1.5 at full size with random weights (about 15 GB of memory, and 4 GB of disk).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Results, about, markdown, peak_of_update
from benchmarks.prepare import SIZES, make_model, make_pairs
from dpo.planning import work
from dpo.planning.sketch import CONFIGS
from dpo.settings.flags import parse
from dpo.train import train_step
from dpo.training.build import build
from dpo.training.memory import ATTENTION

QUIET = ["--workers", "0", "--validate-every", "0", "--checkpoint-every", "0", "--no-samples", "--device", "cpu"]
CASES = {  # of each size: flags
    "tiny": ("", "--lora", "--checkpointing on", "--optimizer adafactor --ema 0.99", "--batch-size 4 --accumulation 2"),
    "mid": ("", "--lora --accumulation 2", "--optimizer adamw8bit --checkpointing on"),
    "sd15": ("--batch-size 1 --optimizer adamw8bit --checkpointing on",),
}
COLUMNS = ["size", "flags", "measured MiB", "planned MiB", "planned / measured", "FLOPs equal", "plan s"]


def make_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 with random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from dpo.tiny import paths

    place = CONFIGS / "sd15"
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(str(place / "vae"))),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(place / "text_encoder")),
        tokenizer=StableDiffusionPipeline.from_pretrained(
            paths.pipeline_path()
        ).tokenizer,  # other words, as many or fewer
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(place / "unet"))),
        scheduler=PNDMScheduler.from_pretrained(place / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def named(size: str, root: Path) -> list[str]:
    """The flags that name model and pairs of a size, which are made below `root`; none for the embedded world."""
    if size == "tiny":
        return []
    model, pairs = root / size / "model", root / size / "pairs"
    if not model.exists():
        make_sd15(model) if size == "sd15" else make_model(model, SIZES[size])
        make_pairs(pairs, 512 if size == "sd15" else SIZES[size]["side"])
    return ["--model", str(model), "--data", str(pairs)]


def row(size: str, flags: str, root: Path) -> dict[str, Any]:
    """A row: one plan, and three updates of the same run."""
    config, notes = parse([*named(size, root), *QUIET, "--output", str(root / "run"), "--overwrite", *flags.split()])
    began = time.monotonic()
    _, taken = work.planner(train_step)(work.prepared(config)[0])
    seconds = time.monotonic() - began
    run = build(config, notes)
    batches = run.batches()

    def update() -> None:
        train_step(run, itertools.islice(batches, run.config.optim.accumulation))
        run.count()

    update()
    measured = peak_of_update(run)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        update()
    batches.close()
    return {
        "size": size,
        "flags": flags or "none",
        "measured MiB": round(measured / 2**20, 1),
        "planned MiB": round(taken.peak / 2**20, 1),
        "planned / measured": f"{taken.peak / measured:.4f}",
        "FLOPs equal": "yes" if counter.get_total_flops() == sum(taken.flops.values()) * run.nominal else "no",
        "plan s": round(seconds, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=CASES, nargs="+", default=["tiny", "mid"], help="(default: tiny mid)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/plan"), help="folder of the table (default: %(default)s)"
    )
    own = parser.parse_args(argv)
    results = Results(own.out, about(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        for size in own.size:
            for flags in CASES[size]:
                results.add("plan", row(size, flags, Path(folder)))
    text = markdown(results.rows["plan"], COLUMNS)
    results.write("plan.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

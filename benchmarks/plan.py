"""How near a plan is to the step: bytes at the peak against those that torch's allocator reports, and counted FLOPs.

    python -m benchmarks.plan [--size tiny|mid|sd3|sd15 ...] [--out FOLDER]

Each row plans a run and trains two updates of it on the CPU. "measured" is what the run held before its second update
and what the allocator then gave out, workspaces inside operations included; "planned / measured" is 1 where the plan is
exact. FLOPs are counted in the third update by torch's own counter. tiny is the embedded world, mid a random pipeline at
256 pixels, sd3 a random one of Stable Diffusion 3 without T5 at 256 pixels, sd15 Stable Diffusion 1.5 at full size with
random weights (about 15 GB of memory, and 4 GB of disk).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from functools import partial
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
    "sd3": tuple(  # whose kept pairs are a share of it; on a GPU they are memory of the host, which is not planned
        f"{flags} --vae-batch 1 --keep-encoded off".strip() for flags in ("", "--lora", "--lora --checkpointing on")
    ),
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


def make_sd3(folder: Path) -> Path:
    """A random pipeline of the layout of Stable Diffusion 3.5 medium, without T5."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from dpo.tiny import paths

    torch.manual_seed(0)
    tokenizer = StableDiffusionPipeline.from_pretrained(paths.pipeline_path()).tokenizer
    width = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=64, **width)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=32,
            num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=128, pooled_projection_dim=128,
            pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        vae=AutoencoderKL(
            block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, latent_channels=16, scaling_factor=1.5305,
            shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(text), text_encoder_2=CLIPTextModelWithProjection(text),
        text_encoder_3=None, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


MADE = {"sd15": (make_sd15, 512), "sd3": (make_sd3, 256)}  # and the side of the images


def named(size: str, root: Path) -> list[str]:
    """The flags that name model and pairs of a size, which are made below `root`; none for the embedded world."""
    if size == "tiny":
        return []
    model, pairs = root / size / "model", root / size / "pairs"
    if not model.exists():
        make, side = MADE.get(size) or (partial(make_model, size=SIZES[size]), SIZES[size]["side"])
        make(model)
        make_pairs(pairs, side)
    return ["--model", str(model), "--data", str(pairs)]


def row(size: str, flags: str, root: Path) -> dict[str, Any]:
    """A row: one plan, and three updates of the same run."""
    config, notes = parse([*named(size, root), *QUIET, "--output", str(root / "run"), "--overwrite", *flags.split()])
    began = time.monotonic()
    _, taken = work.planner(train_step)(work.prepared(config))
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
    parser.add_argument(
        "--size", choices=CASES, nargs="+", default=["tiny", "mid", "sd3"], help="(default: %(default)s)"
    )
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

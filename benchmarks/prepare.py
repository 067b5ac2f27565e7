"""Wall-clock of a training step from images, from a prepared store, and with recorded reference errors; what the host
adds.

    python -m benchmarks.prepare [--size tiny|mid] [--steps 12] [--out FOLDER]

Random pipelines of two sizes, made in a temporary folder, full fine-tuning on the CPU in one thread. The three kinds of
run take turns, step by step, so that a busy machine slows them alike; the figures are medians over steps, in seconds of
this process's CPU time and of the clock. "host" is the share of the trainer's own loop, recorded errors and all, that
is spent outside the UNet's forward and backward and the optimizer: reading, noising, the loss, metrics, logs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import Results, about, markdown
from dpo import prepare
from dpo.settings.flags import parse
from dpo.train import train_step
from dpo.training import flops, loop
from dpo.training.build import build
from dpo.training.trackers import open_trackers

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"side": 32, "unet": (16, 32), "vae": (8, 16, 16), "layers": 1, "batch": 4},
    "mid": {"side": 256, "unet": (64, 128, 128), "vae": (32, 64, 64, 64), "layers": 1, "batch": 2},
}
PAIRS = 16
QUIET = ["--workers", "0", "--validate-every", "0", "--checkpoint-every", "0", "--overwrite"]


def make_model(folder: Path, size: dict[str, Any], family: str = "sd") -> Path:
    """A random pipeline of the layout of SD 1.x or SDXL; its VAE has factor 4 (tiny) or 8 (mid)."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from dpo.tiny import paths

    torch.manual_seed(0)
    unet, vae, layers = size["unet"], size["vae"], size["layers"]
    levels = len(unet) - 1
    tokenizer = StableDiffusionPipeline.from_pretrained(paths.pipeline_path()).tokenizer
    width = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=64, **width)
    common = {
        "vae": AutoencoderKL(
            block_out_channels=vae,
            down_block_types=("DownEncoderBlock2D",) * len(vae),
            up_block_types=("UpDecoderBlock2D",) * len(vae),
            layers_per_block=layers,
            norm_num_groups=8,
            latent_channels=4,
        ),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
    }
    shape = {
        "sample_size": size["side"] // 2 ** (len(vae) - 1),
        "block_out_channels": unet,
        "layers_per_block": layers,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
    }
    if family == "sd":
        network = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
            cross_attention_dim=64,
            **shape,
        )
        StableDiffusionPipeline(
            **common, unet=network, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ).save_pretrained(folder)
        return folder
    network = UNet2DConditionModel(
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels + ("UpBlock2D",),
        transformer_layers_per_block=(1, 2, 10)[: len(unet)],
        cross_attention_dim=128,  # of both text encoders
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32,
        **shape,
    )
    second = CLIPTextModelWithProjection(text)
    StableDiffusionXLPipeline(
        **common, unet=network, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
    ).save_pretrained(folder)
    return folder


def make_pairs(folder: Path, side: int) -> Path:
    """Folders w/ and l/ of JPEG files a quarter larger than what is trained on, with captions."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for half in ("w", "l"):
        (folder / half).mkdir(parents=True)
        for i in range(PAIRS):
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side * 5 // 4,) * 2).save(folder / half / f"{i:03d}.jpg", quality=90)
            (folder / half / f"{i:03d}.txt").write_text(f"picture number {i}", "utf-8")
    return folder


def make_run(model: Path, data: Path, out: Path, batch: int, *flags: str) -> Any:
    config, notes = parse(
        ["--model", str(model), "--data", str(data), "--output", str(out), "--batch-size", str(batch), *QUIET, *flags]
    )
    return build(config, notes)


def measure(name: str, steps: int) -> dict[str, Any]:
    """Seconds a step of the three kinds of run, their ratios beside those of the counted FLOPs, and the host's share."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, pairs = make_model(root / "model", size), make_pairs(root / "pairs", size["side"])
        store, batch = root / "store", size["batch"]
        flags = ["--model", str(model), "--data", str(pairs), "--batch-size", str(batch), "--workers", "0"]
        if prepare.main(["--store", str(store), "--reference", "--draws", "1", "--dtype", "fp32", *flags]):
            raise RuntimeError("preparing failed")
        kinds = {
            "images": make_run(model, pairs, root / "a", batch, "--keep-encoded", "off"),
            "prepared": make_run(model, store, root / "b", batch),
            "prepared + recorded": make_run(model, store, root / "c", batch, "--reference", "recorded"),
        }
        seconds = turns(kinds, steps)
        row: dict[str, Any] = {"size": name, "steps": steps}
        base = seconds["prepared + recorded"]
        counted = counted_flops(kinds["images"])
        for kind, (cpu, wall) in seconds.items():
            row |= {f"{kind}, CPU s": cpu, f"{kind}, clock s": wall}
        for kind in ("images", "prepared"):
            row |= {
                f"{kind} / recorded, CPU": seconds[kind][0] / base[0],
                f"{kind} / recorded, clock": seconds[kind][1] / base[1],
            }
            row[f"{kind} / recorded, FLOPs"] = counted[kind] / counted["prepared + recorded"]
        run = make_run(model, store, root / "d", batch, "--reference", "recorded", "--steps", str(steps))
        return row | host_share(run)


def turns(runs: dict[str, Any], steps: int) -> dict[str, tuple[float, float]]:
    """Median (CPU, clock) seconds of a step of each run; the first two steps of each are left out."""
    streams = {kind: run.batches() for kind, run in runs.items()}
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in runs}
    for number in range(steps + 2):
        for kind, run in runs.items():
            before = time.process_time(), time.perf_counter()
            train_step(run, itertools.islice(streams[kind], 1))
            run.done += 1
            run.position += run.nominal
            if number >= 2:
                times[kind].append((time.process_time() - before[0], time.perf_counter() - before[1]))
    for stream in streams.values():
        stream.close()
    return {
        kind: (statistics.median(c for c, _ in found), statistics.median(w for _, w in found))
        for kind, found in times.items()
    }


def counted_flops(run: Any) -> dict[str, float]:
    """FLOPs of a pair by kind of run (the text encoder left out: it is small here)."""
    side, scale = run.config.data.resolution, run.model.geometry.vae_scale
    text = run.model.text_encoders[0].config.max_position_embeddings
    forward = flops.unet_flops(dict(run.model.denoiser.config), side // scale, side // scale, text)
    encode = flops.vae_encode_flops(dict(run.model.vae.config), side, side)
    return {
        "images": flops.pair_flops(forward, encode=encode),
        "prepared": flops.pair_flops(forward),
        "prepared + recorded": flops.pair_flops(forward, reference="recorded"),
    }


def host_share(run: Any) -> dict[str, float]:
    """Share of the trainer's loop outside UNet and optimizer, of its own thread's CPU time and of the clock."""
    inside = [0.0, 0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = time.thread_time(), time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside[0] += time.thread_time() - before[0]
                inside[1] += time.perf_counter() - before[1]

        return call

    run.output.mkdir(parents=True, exist_ok=True)
    trackers = open_trackers(run.output)
    with patched(run.step, "policy", timed), patched(torch.Tensor, "backward", timed):
        with patched(run.updater, "update", timed), patched(run.updater, "grad_norm", timed):
            before = time.thread_time(), time.perf_counter()
            loop.updates(run, trackers, train_step, threading.Event())
            total = time.thread_time() - before[0], time.perf_counter() - before[1]
    trackers.close()
    return {"host, CPU %": 100 * (1 - inside[0] / total[0]), "host, clock %": 100 * (1 - inside[1] / total[1])}


@contextmanager
def patched(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), nargs="*", default=list(SIZES), help="pipelines to measure (default: all)"
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of each kind of run (default: 12)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/prepare"),
        help="folder of the table (default: %(default)s)",
    )
    own = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(own.out, about(torch.device("cpu")))
    for size in own.size:
        results.add("prepare", measure(size, own.steps))
    table = results.rows["prepare"]
    columns = [
        "size",
        *(name for name in table[0] if "/" in name or "host" in name),
        *(name for name in table[0] if name.endswith(" s")),
    ]
    text = markdown(table, columns)
    results.write("prepare.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

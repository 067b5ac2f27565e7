"""The trainer's update against the peers' shape of one, on this machine's CPU: CPU time and counted FLOPs.

    python -m benchmarks.step [--size tiny|mid] [--family sd sdxl] [--train full lora] [--updates 6] [--processes] [--out FOLDER]

Random pipelines of two sizes, of the layouts of SD 1.x and SDXL, in fp32 and one thread. Peers and ours take turns,
update by update, so that a busy machine slows them alike; figures are medians over updates of each turn's ratio, with
the quarters around them. The peers' update is `peers_update`, written from the order of work of the public Diffusion-DPO
scripts; images are decoded by our loader in both. Ours comes from images, from encodings that were kept in memory (the
second epoch on), from a prepared store, and from a store with recorded reference errors.

In the peers' favour: no checkpointing is forced on SDXL, and in fp32 their casts cost nothing.

--processes adds weak scaling: a process alone against two at once, each with a micro-batch of its own, by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Results, about, markdown
from benchmarks.prepare import QUIET, SIZES, make_model, make_pairs, make_run
from dpo import prepare
from dpo.data.batch import PairBatch
from dpo.models.family import Denoise, TextEncoding
from dpo.pages.folder import METRICS_FILE
from dpo.train import train_step
from dpo.training.memory import ATTENTION
from dpo.training.run import Run

TURNS = 5  # starts of one process and of two
WARM = 2  # updates of each that are not counted
VAE_BATCH = 8  # images the peers encode at a time
FAMILIES, TRAINED = ("sd", "sdxl"), ("full", "lora")
WAYS = ("images", "kept", "store", "recorded")


def peers_loss(
    policy: Denoise, reference: Denoise, latents: Tensor, text: TextEncoding, sizes: Tensor | None, abar: Tensor
) -> Tensor:
    """The peers' loss of B pairs from latents [2B, C, h, w], winners first, and captions encoded B times: 0-d.

    Noise and timesteps come from the global generator; the reference's forward follows the policy's. abar [T].
    """
    half = len(latents) // 2
    noise = torch.randn_like(latents[:half]).repeat(2, 1, 1, 1)
    t = torch.randint(0, len(abar), (half,), device=latents.device).repeat(2)
    a = abar[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    errors = (policy(noisy, t, text.twice(), sizes).float() - noise).square().mean((1, 2, 3))
    with torch.no_grad():
        others = (reference(noisy, t, text.twice(), sizes).float() - noise).square().mean((1, 2, 3))
    win, lose = (errors - others).split(half)
    return -F.logsigmoid(-2500 * (win - lose)).mean()


@torch.no_grad()
def peers_encoding(vae: Any, pixels: Tensor, encode_text: Callable[[], TextEncoding]) -> tuple[Tensor, TextEncoding]:
    """Latents [N, C, h, w] of pixels [N, 3, H, W] in [-1, 1], and captions, as the peers encode them in every step."""
    images = pixels.to(next(vae.parameters()).dtype).split(VAE_BATCH)
    latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images]).float()
    return latents * vae.config["scaling_factor"], encode_text()


def peers_update(run: Run, stream: Iterator[PairBatch]) -> Callable[[], None]:
    """An update as the peers make it, on the modules and images of `run`: everything encoded anew in every step."""
    model, path = run.model, run.step.path
    parameters = run.updater.parameters
    updates = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-2)
    assert run.step.reference is not None, "the peers compute the reference in every step"
    policy, reference = run.step.policy, run.step.reference

    def update() -> None:
        batch = next(stream)
        assert batch.pixels is not None, "the run reads images"
        pixels, captions = batch.pixels.float() / 127.5 - 1, batch.captions
        latents, text = peers_encoding(model.vae, pixels, lambda: model.family.encode(model, captions))
        peers_loss(policy, reference, latents, text, batch.micro, path.signal.square()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        updates.step()
        updates.zero_grad()

    return update


def our_update(run: Run, stream: Iterator[PairBatch]) -> Callable[[], None]:
    """The trainer's own update of `run`."""

    def update() -> None:
        train_step(run, itertools.islice(stream, run.config.optim.accumulation))
        run.count()

    return update


@contextmanager
def updates_of(name: str, family: str, trained: str, root: Path) -> Iterator[dict[str, Callable[[], None]]]:
    """The peers' update and ours in each way, ready to be called; their batches are closed at the end of the block."""
    size = SIZES[name]
    model, pairs, batch = (
        make_model(root / "model", size, family),
        make_pairs(root / "pairs", size["side"]),
        size["batch"],
    )
    flags = ["--model", str(model), "--data", str(pairs), "--workers", "0"]
    if prepare.main(["--store", str(root / "store"), "--reference", "--draws", "1", "--dtype", "fp32", *flags]):
        raise RuntimeError("preparing failed")
    own = ["--lora", "--rank", "8"] if trained == "lora" else []
    plain = [*own, "--keep-encoded", "off"]

    def run(way: str, data: str, *flags: str) -> Run:
        return make_run(model, root / data, root / way, batch, "--epochs", "1000", *flags)

    runs = {
        "peers": run("peers", "pairs", *plain),
        "images": run("images", "pairs", *plain),
        "kept": run("kept", "pairs", *own, "--keep-encoded", "on"),
        "store": run("stored", "store", *own),
        "recorded": run("recorded", "store", *own, "--reference", "recorded"),
    }
    with ExitStack() as streams:
        found = {}
        for way, each in runs.items():
            stream = streams.enter_context(closing(each.batches()))
            found[way] = (peers_update if way == "peers" else our_update)(each, stream)
        while runs["kept"].position < 3 * len(runs["kept"].source):  # encoded once, and once more to compare
            found["kept"]()
        yield found


def measure(name: str, family: str, trained: str, count: int) -> dict[str, Any]:
    """Ours over the peers', by way: CPU time with its quarters, and counted FLOPs."""
    with tempfile.TemporaryDirectory() as place, updates_of(name, family, trained, Path(place)) as updates:
        seconds: dict[str, list[float]] = {way: [] for way in updates}
        for turn in range(WARM + count):
            for way, update in updates.items():
                began = time.process_time()
                update()
                if turn >= WARM:
                    seconds[way].append(time.process_time() - began)
        flops = {}
        for way, update in updates.items():
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                update()
            flops[way] = counter.get_total_flops()
    row: dict[str, Any] = {"size": name, "family": family, "trained": trained, "updates": count}
    row["peers, CPU s"] = statistics.median(seconds["peers"])
    for way in WAYS:
        ratios = [peer / own for peer, own in zip(seconds["peers"], seconds[way], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {f"{way}, x": middle, f"{way}, quarters": f"{low:.2f} to {high:.2f}"}
        row[f"{way}, FLOPs x"] = flops["peers"] / flops[way]
    return row


def scaling(name: str, count: int) -> dict[str, Any]:
    """Pairs a second of one process, and of two at once, each with a micro-batch of its own, by torchrun, in turns."""
    size = SIZES[name]
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, pairs = make_model(root / "model", size), make_pairs(root / "pairs", size["side"])
        flags = [
            "--model",
            str(model),
            "--data",
            str(pairs),
            "--batch-size",
            str(size["batch"]),
            *QUIET,
            "--no-samples",
        ]
        flags += ["--steps", str(WARM + count), "--keep-encoded", "off", "--threads", "1"]
        for turn, processes in itertools.product(range(TURNS), rates):
            output = root / f"{turn}-by-{processes}"
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ]
            words = [*launcher, "-m", "dpo.train", *flags, "--output", str(output)]
            subprocess.run(words, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            lines = map(json.loads, (output / METRICS_FILE).read_text("utf-8").splitlines())
            found = [line["pairs_per_s"] for line in lines if "pairs_per_s" in line]
            rates[processes].append(statistics.median(found[WARM:]))
    shares = [two / 2 / alone for alone, two in zip(rates[1], rates[2], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    medians = {f"pairs/s of {processes}": statistics.median(found) for processes, found in rates.items()}
    return {"size": name, **medians, "share of twice": middle, "quarters": f"{low:.2f} to {high:.2f}"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), nargs="*", default=list(SIZES), help="pipelines (default: all)")
    parser.add_argument("--family", choices=FAMILIES, nargs="*", default=list(FAMILIES), help="layouts (default: both)")
    parser.add_argument("--train", choices=TRAINED, nargs="*", default=list(TRAINED), help="default: both")
    parser.add_argument("--updates", type=int, default=6, help="counted updates of each, at least 2 (default: 6)")
    parser.add_argument("--processes", action="store_true", help="weak scaling on two processes too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step"), help="default: %(default)s")
    own = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(own.out, about(torch.device("cpu")))
    for size, family, trained in itertools.product(own.size, own.family, own.train):
        results.add("step", measure(size, family, trained, own.updates))
    text = markdown(results.rows["step"], list(results.rows["step"][0]))
    if own.processes:
        for size in own.size:
            results.add("processes", scaling(size, own.updates))
        text += "\n" + markdown(results.rows["processes"], list(results.rows["processes"][0]))
    results.write("step.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

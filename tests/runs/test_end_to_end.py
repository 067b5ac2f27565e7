"""Whole runs on tiny pipelines with a learnable preference: winners are bright and red, losers dark and blue."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image

from dpo.common import console, locks
from dpo.data.images import decode
from dpo.pages.folder import ADAPTER_FILE, ENTRIES
from dpo.settings.flags import parse
from tests.help.commands import command
from tests.help.running import make_run
from tests.help.worlds import ODDITIES, make_pickapic

PIPELINES = {"sd15": "StableDiffusionPipeline", "sd2v": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_in", "conv_out")  # attention alone moves this UNet too little
RUNS = {
    "sd15, all weights": ("sd15", ["--learning-rate", "3e-5"]),
    "sd15, LoRA, dde": ("sd15", ["--lora", "--method", "dde", "--learning-rate", "2e-3"]),
    "sd2v, all weights": ("sd2v", ["--learning-rate", "1e-4"]),
    "sdxl, LoRA": (
        "sdxl",
        ["--lora", "--learning-rate", "1e-3", "--beta", "500", "--target-modules", *ATTENTION, *CONVOLUTIONS],
    ),
}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """64 pairs of every odd kind of image among ties, unlabelled rows and broken files; 24 held-out pairs."""
    folder = tmp_path_factory.mktemp("messy")
    odd = {"odd_sizes": True, "oddities": ODDITIES}
    make_pickapic(
        folder, 64, 0, ties=4, unlabelled=3, duplicates=2, broken=("truncated", "corrupt", "empty"), shards=2, **odd
    )
    return make_pickapic(folder, 24, 1, split="validation")


SLOW = ("sd15, all weights", "sd2v, all weights", "sdxl, LoRA")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [pytest.param(*run, marks=[pytest.mark.slow] * (name in SLOW), id=name) for name, run in RUNS.items()],
)
def test_a_preference_is_learnt_and_the_result_draws(world, messy, tmp_path, capsys, monkeypatch, kind, flags):
    monkeypatch.setattr(console, "SILENCE", 0.0)
    words = [
        "--model",
        world(kind),
        "--data",
        messy,
        "--validation-data",
        messy,
        "--output",
        tmp_path / "out",
        "--workers",
        "0",
    ]
    words += [
        "--batch-size",
        "8",
        "--steps",
        "24",
        "--validate-every",
        "12",
        "--validation-draws",
        "4",
        "--sample-steps",
        "2",
    ]
    said = command(capsys, *words, *flags, "--sample-prompts", "a red fox", "a blue lamp", "--sample-seeds", "0", "1")
    assert said.code == 0 and said.errors == []
    assert any("76 rows: 69 pairs; left out: 4 ties, 3 unlabelled" in line for line in said.log)
    assert len(said.warnings("pair left out")) == 3, "unreadable images"
    assert stages(said.log) == [
        "held-out pairs encoded", "held-out reference errors", "sample images", "step", "held-out accuracy", "step",
        "held-out accuracy", "step", "sample images",
    ]  # fmt: skip

    out = tmp_path / "out"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert sum(losses[-6:]) / 6 < losses[0] - 0.1, "the loss falls"
    checks = [record for record in records if record.get("event") == "validation"]
    print(*(f"{loss:.3f}" for loss in losses), "held out:", *(f"{check['heldout_accuracy']:.3f}" for check in checks))
    assert [check["step"] for check in checks] == [12, 24] and checks[-1]["heldout_pairs"] == 24
    assert checks[-1]["heldout_accuracy"] >= 0.75 and checks[-1]["heldout_interval"][0] > 0.5
    check_files(out)
    check_result(kind, Path(world(kind)), out, lora="--lora" in flags)


def stages(log):
    """Which parts of a run said how far they were, in their order; "step": its updates."""
    parts = ("held-out pairs encoded", "held-out reference errors", "held-out accuracy", "sample images", "step")
    said = [part for line in log for part in parts if line.split(" INFO ")[-1].startswith(f"{part} ")]
    return [part for part, _ in groupby(said)]


def check_files(out):
    """Every file that a run should leave is in its folder."""
    for name in (
        "README.md",
        "config.toml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "curves.png",
        "deciles.png",
    ):
        assert (out / name).stat().st_size > 300, name
    grid = Image.open(out / "samples" / "step-00000024.png")
    assert grid.width > 64 and len(list((out / "samples" / "before").glob("*.png"))) == 4
    assert (out / "README.md").read_text().startswith("---\n")
    again, _ = parse(["--config", str(out / "config.toml"), "--output", "elsewhere"])
    assert again.optim.steps == 24 and again.method.beta is not None, "the settings as they were decided"
    assert [path.name for path in out.rglob("*.part*")] == []
    assert {path.name for path in out.iterdir()} <= {entry.name for entry in ENTRIES} | {locks.NAME}, (
        "dpo/pages/folder.py lists them all"
    )


def check_result(kind, model, out, lora):
    """diffusers loads the result, its UNet differs from the model's, and it draws images."""
    import diffusers

    pipeline = getattr(diffusers, PIPELINES[kind])
    base = pipeline.from_pretrained(model)
    pipe = pipeline.from_pretrained(model if lora else out)
    if lora:
        pipe.load_lora_weights(out, weight_name=ADAPTER_FILE)
    else:
        other = dict(base.unet.named_parameters())
        assert any(not torch.equal(value, other[name]) for name, value in pipe.unet.named_parameters())
        assert dict(pipe.scheduler.config) == dict(base.scheduler.config), (
            "prediction type and noise schedule are the model's"
        )
    images = []
    for loaded in (base, pipe):
        loaded.set_progress_bar_config(disable=True)
        images.append(loaded("a red fox", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0])
    assert images[1].size == (32, 32) and images[0].tobytes() != images[1].tobytes()


def test_sdxl_is_told_the_size_and_crop_of_each_image(world, messy, tmp_path):
    run = make_run(world("sdxl"), str(messy), tmp_path / "out", "--batch-size", "24", "--steps", "1")
    told = []
    policy = run.step.policy

    def listening(x_t, t, text, sizes):
        told.append(sizes)
        return policy(x_t, t, text, sizes)

    run.step.policy = listening
    batches = run.batches()
    batch = next(batches)
    batches.close()
    with torch.no_grad():
        run.step(run.encoder.inputs(batch), run.correction())
    pairs = {pair.key: pair for pair in (run.source[i] for i in range(len(run.source)))}
    expected = []
    for image in ("win", "lose"):
        for key, usable in zip(batch.keys.tolist(), batch.usable.tolist()):
            expected.append(conditioning(getattr(pairs[key], image)) if usable else [32, 32, 0, 0, 32, 32])
    assert told[0].tolist() == expected
    assert len({tuple(row[:2]) for row in expected}) > 24 and any(row[2] or row[3] for row in expected)


def conditioning(image) -> list[float]:
    """Upright height and width, top and left of the centre crop once the short side is 32, and 32 x 32."""
    width, height = decode(image.load()).size
    short = min(width, height)
    top, left = ((round(side * 32 / short) - 32) // 2 for side in (height, width))
    return [height, width, top, left, 32, 32]

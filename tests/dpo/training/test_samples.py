"""dpo.training.samples: the prompts asked for, images before the first update, and a grid beside them."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.drawing import draw, memory
from dpo.drawing.draw import sample
from dpo.drawing.grid import read_grid
from dpo.settings.config import Output
from dpo.training import results, samples
from dpo.training.checkpoint import pack
from tests.help.commands import command
from tests.help.running import advance, everything, make_run
from tests.help.worlds import KINDS

ASKED = ["--sample-prompts", "a red fox", "--sample-seeds", "0", "5", "--sample-steps", "2"]


def start(world, folder, *flags, kind="sd15"):
    return make_run(world(kind), world("pairs"), folder, "--batch-size", "2", *flags)


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    for mark in ("", "\ufeff"):  # editors on Windows begin a file with a mark of its byte order
        file.write_text(mark + "a red fox\n\n  a blue lamp \n", encoding="utf-8")
        assert samples.asked_prompts(Output(sample_prompts=(str(file),))) == ["a red fox", "a blue lamp"]
    assert samples.asked_prompts(Output(sample_prompts=("one", "two"))) == ["one", "two"]
    file.write_text(" \n")
    for path, message in ((file, "has no prompt"), (tmp_path / "nowhere.txt", "cannot be read")):
        with pytest.raises(UserError, match=f"--sample-prompts .*{path.name}: {message}"):
            samples.asked_prompts(Output(sample_prompts=(str(path),)))


def test_without_prompts_the_first_captions_are_drawn(world, tmp_path):
    run = start(world, tmp_path)
    assert samples.prompts(run) == [run.source[index].caption for index in range(samples.DEFAULT_PROMPTS)]


def test_before_and_after(world, tmp_path):
    run = start(world, tmp_path, *ASKED)
    samples.before(run)
    first = {path.name: path.read_bytes() for path in (tmp_path / "samples" / "before").iterdir()}
    assert first.keys() == {"000.png", "001.png"}
    with torch.no_grad():
        run.model.denoiser.conv_out.bias.add_(0.5)
    run.done = 3
    samples.before(run)  # the policy is no longer what it was: they stay
    assert {path.name: path.read_bytes() for path in (tmp_path / "samples" / "before").iterdir()} == first
    path = samples.write(run)
    assert path.name == "step-00000003.png"
    for cell in read_grid(path):
        assert cell.prompt == "a red fox" and cell.images.keys() == {"before", "after"}
        assert not np.array_equal(*(np.asarray(image) for image in cell.images.values()))


def test_a_link_among_the_images_is_replaced_not_followed(world, tmp_path):
    target, place = tmp_path / "key", tmp_path / "out" / "samples" / "before" / "000.png"
    target.write_text("mine")
    place.parent.mkdir(parents=True)
    place.symlink_to(target)
    samples.before(start(world, tmp_path / "out", "--overwrite", *ASKED))
    assert target.read_text() == "mine" and not place.is_symlink()


def test_a_grid_without_the_images_before(world, tmp_path):
    run = start(world, tmp_path, *ASKED)
    assert all(cell.images.keys() == {"after"} for cell in read_grid(samples.write(run)))


OTHER = ["--prediction-type", "v_prediction", "--zero-snr", "on", "--sample-guidance", "5"]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "flags"), [*((kind, []) for kind in KINDS), ("sd15", OTHER), ("sdxl", OTHER)])
def test_the_saved_folder_draws_the_same_images(world, tmp_path, kind, flags):
    """What a run shows and what `from_pretrained` gives from its folder."""
    run = start(world, tmp_path, *ASKED, *flags, kind=kind)
    with torch.no_grad():
        run.model.denoiser.conv_out.bias.add_(0.3)
    samples.before(run)
    shown = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples" / "before").iterdir())]
    results.write(run)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    out = run.config.output
    again = sample(
        pipe, [("a red fox", seed) for seed in out.sample_seeds], device="cpu", steps=2, guidance=out.sample_guidance
    )
    assert len(shown) == 2 and all(np.array_equal(one, np.asarray(two)) for one, two in zip(shown, again, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--ema", "0.9"], ["--sample-batch", "2"]], ids=" ".join)
def test_where_memory_is_short_room_is_made(world, tmp_path, monkeypatch, caplog, flags):
    """One at a time unless a number is given; the optimizer's state is away, and the run goes on bit for bit."""
    run = start(world, tmp_path, *ASKED, "--optimizer", "adamw8bit", *flags)
    advance(run, 1)
    usual = read_grid(samples.write(run))
    before = everything(run)
    seen = []

    def drawn(pipe, *args, **options):
        states = pack(run.updater.optimizer.state_dict())[0]
        seen.append((options["batch"], options["frugal"], states["m_8bit"].untyped_storage().nbytes()))
        return sample(pipe, *args, **options)

    monkeypatch.setattr(memory, "free", lambda device: 1000)
    monkeypatch.setattr(draw, "sample", drawn)
    with caplog.at_level(logging.INFO, "dpo"):
        short = read_grid(samples.write(run))
    batch = 2 if "--sample-batch" in flags else 1
    assert seen == [(batch, True, 0)]
    assert f"0.0 GiB free, so {batch} at a time, the VAE in tiles, the optimizer's state on the host" in caplog.text
    found = everything(run)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    for one, two in zip(usual, short, strict=True):  # images this small have one tile; a batch of one may round
        assert np.abs(np.asarray(one.images["after"]).astype(int) - np.asarray(two.images["after"])).max() <= 1


def test_out_of_memory_while_drawing_costs_the_images_alone(world, tmp_path, monkeypatch, caplog):
    run = start(world, tmp_path, *ASKED)

    def too_large(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(draw, "sample", too_large)
    samples.before(run)
    assert samples.write(run) is None and not (tmp_path / "samples").exists()
    first, second = [record.getMessage() for record in caplog.records if "out of GPU memory" in record.getMessage()]
    assert first == second and "while drawing sample images (CUDA out of memory): these are left out" in first
    assert (
        "training goes on; leave them all out with --no-samples, or draw fewer at a time with --sample-batch 1" in first
    )
    advance(run, 1)


@pytest.mark.long
def test_samples_can_be_left_out(world, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--batch-size", "2", "--steps", "2", "--sample-every", "1", "--no-samples", "--workers", "0"]
    words = ["--model", world("sd15"), "--data", world("pairs"), "--output", out, "--max-pairs", "8", *flags]
    said = command(capsys, *words, "--validate-every", "0")
    assert said.code == 0 and said.warnings("--sample-every has no effect with --no-samples") == []
    assert any("--sample-every has no effect with --no-samples" in line for line in said.log)
    assert (out / "report.html").exists() and (out / "README.md").exists() and not (out / "samples").exists()
    assert "samples/" not in (out / "README.md").read_text()

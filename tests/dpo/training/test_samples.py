"""dpo.training.samples: the prompts asked for, images before the first update, and a grid beside them."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.drawing.draw import sample
from dpo.drawing.grid import read_grid
from dpo.settings.config import Output
from dpo.training import results, samples
from tests.help.running import make_run
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


def test_a_grid_without_the_images_before(world, tmp_path):
    run = start(world, tmp_path, *ASKED)
    assert all(cell.images.keys() == {"after"} for cell in read_grid(samples.write(run)))


OTHER = ["--prediction-type", "v_prediction", "--zero-snr", "on", "--sample-guidance", "5"]


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
    again = sample(pipe, ["a red fox"], out.sample_seeds, device="cpu", steps=2, guidance=out.sample_guidance)
    assert len(shown) == 2 and all(np.array_equal(one, np.asarray(two)) for one, two in zip(shown, again, strict=True))

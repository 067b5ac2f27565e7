"""With --ema everything that describes the result is of the weights that are saved: pictures, accuracy, verdict."""

import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo.drawing.draw import sample
from dpo.drawing.grid import read_grid, write_grid
from dpo.pages.folder import read_run
from dpo.pages.verdict import verdict
from dpo.training import validation
from tests.help.commands import command
from tests.help.running import make_run


@pytest.mark.long
def test_figures_and_pictures_are_of_what_is_saved(world, tmp_path, capsys):
    """Learning rate and decay are large, so that the two sets of weights differ and a mix-up is seen."""
    flags = ["--batch-size", "4", "--steps", "6", "--learning-rate", "3e-3", "--ema", "0.999", "--validate-every", "6"]
    flags += ["--validation-data", world("pairs"), "--validation-split", "train", "--validation-draws", "2"]
    flags += ["--max-pairs", "12", "--validation-pairs", "8"]
    flags += ["--sample-prompts", "a fox", "--sample-seeds", "3", "--sample-steps", "2"]
    out = tmp_path / "run"
    words = ["--model", world("sd15"), "--data", world("pairs"), "--output", str(out), "--workers", "0", *flags]
    said = command(capsys, *words)
    assert said.code == 0 and any("averaged weights (--ema 0.999): they are the result" in line for line in said.log)
    live = load_file(out / "checkpoints" / "step-00000006" / "policy.safetensors")
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, use_safetensors=True)
    assert not torch.equal(pipe.unet.state_dict()["conv_in.weight"], live["conv_in.weight"])

    run = make_run(world("sd15"), world("pairs"), tmp_path / "again", *flags)
    run.model.denoiser.load_state_dict(pipe.unet.state_dict())
    found = validation.accuracy(run.step, run.held_out)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    (event,) = [row for row in rows if "heldout_accuracy" in row]
    assert found["heldout_difference"] != 0 and event == {**event, **found, "weights": "averaged"}
    assert "of the averaged weights, which are saved" in " ".join(verdict(read_run(out)).sentences)

    images = sample(pipe, [("a fox", 3)], device="cpu", steps=2, guidance=7.5)
    expected = read_grid(write_grid(tmp_path / "grid.png", ["a fox"], [3], {"after": images}))[0].images["after"]
    drawn = read_grid(out / "samples" / "step-00000006.png")[0].images
    assert np.array_equal(drawn["after"], expected) and not np.array_equal(drawn["before"], expected)

"""dpo.models.pipeline: what is drawn during a run and what the saved folder draws are the same image."""

import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from dpo.drawing.draw import sample
from dpo.models import ready
from dpo.models.pipeline import pipeline_of, scheduler_of
from dpo.models.save import save_pipeline
from dpo.settings.config import Config, change
from tests.help.worlds import KINDS


def decided(folder, **settings):
    """A model whose settings are decided, as a run has it, with weights that are not the stored ones."""
    _, model, _, _ = ready.load_model(change(Config(), model=str(folder), **settings), torch.device("cpu"))
    with torch.no_grad():
        model.denoiser.conv_out.bias.add_(0.3)
    return model


def drawn(pipe, guidance: float = 2.0) -> np.ndarray:
    images = sample(pipe, ["a fox", ""], [3], device="cpu", steps=3, guidance=guidance)
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_folder_draws_what_the_run_draws(world, tmp_path, kind, guidance):
    """With guidance the empty prompt counts as well, which SDXL and Turbo encode in two ways."""
    model = decided(world(kind))
    save_pipeline(model, copy.deepcopy(model.denoiser), tmp_path)
    saved = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert np.array_equal(drawn(pipeline_of(model), guidance), drawn(saved, guidance))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_as_it_is_keeps_its_scheduler(world, tmp_path, kind):
    model = decided(world(kind))
    save_pipeline(model, model.denoiser, tmp_path)
    written, source = (
        Path(f"{folder}/scheduler/scheduler_config.json").read_bytes() for folder in (tmp_path, world(kind))
    )
    assert json.loads(written) == json.loads(source)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_another_prediction_type_is_drawn_and_saved(world, tmp_path, kind):
    model = decided(world(kind), prediction_type="v_prediction")
    assert scheduler_of(model).config.prediction_type == "v_prediction"
    save_pipeline(model, copy.deepcopy(model.denoiser), tmp_path)
    saved = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert saved.scheduler.config.prediction_type == "v_prediction"
    assert np.array_equal(drawn(pipeline_of(model)), drawn(saved))
    assert not np.array_equal(drawn(saved), drawn(pipeline_of(decided(world(kind)))))


def test_modules_are_shared_and_the_denoiser_can_be_another(world):
    model = decided(world("sdxl"))
    policy = copy.deepcopy(model.denoiser)
    pipe = pipeline_of(model, policy)
    assert pipe.unet is policy and pipeline_of(model).unet is model.denoiser
    assert pipe.vae is model.vae and [pipe.text_encoder, pipe.text_encoder_2] == model.text_encoders


def test_a_scheduler_without_a_name_is_ddim(world):
    model = decided(world("sd15"))
    del model.scheduler_config["_class_name"]
    assert type(scheduler_of(model)) is diffusers.DDIMScheduler

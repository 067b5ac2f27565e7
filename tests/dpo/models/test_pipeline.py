"""dpo.models.pipeline: what is drawn during a run and what the saved folder draws are the same image."""

import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from dpo import schedule
from dpo.drawing.draw import sample
from dpo.models import ready
from dpo.models.pipeline import as_trained, pipeline_of, scheduler_of
from dpo.models.save import save_pipeline
from dpo.settings.config import Config, change
from tests.help.ldm import write_single_file
from tests.help.worlds import KINDS, make_pipeline


def decided(folder, **settings):
    """A model whose settings are decided, as a run has it, with weights that are not the stored ones."""
    _, model, _, _ = ready.load_model(change(Config(), model=str(folder), **settings), torch.device("cpu"))
    with torch.no_grad():
        model.denoiser.conv_out.bias.add_(0.3)
    return model


def drawn(pipe, guidance: float = 2.0) -> np.ndarray:
    images = sample(pipe, [("a fox", 3), ("", 3)], device="cpu", steps=3, guidance=guidance)
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.long
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


@pytest.mark.long
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


# --- the scheduler is that of the training ------------------------------------------------------------------------------

NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
)  # fmt: skip


def drawn_by_an_exact_model(scheduler, plan: schedule.Schedule, x_0: torch.Tensor, steps: int = 20) -> torch.Tensor:
    """What `scheduler` draws with a denoiser that predicts the one image x_0 exactly, on the schedule of the training."""
    scheduler.set_timesteps(steps)
    x = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        abar = plan.alphas_cumprod[t.long()]
        x_t = scheduler.scale_model_input(x, t).double()
        noise = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
        predicted = abar.sqrt() * noise - (1 - abar).sqrt() * x_0 if plan.velocity else noise
        options = {"generator": torch.Generator().manual_seed(1)} if "Ancestral" in type(scheduler).__name__ else {}
        x = scheduler.step(predicted.float(), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_zero_snr_model_is_sampled_to_its_image(name, prediction):
    """Whatever the class: a latent outside [-1, 1] comes back. With the source's own betas a brighter one would."""
    plan = schedule.from_scheduler(NOISE | {"prediction_type": prediction}, prediction_type=prediction, zero_snr=True)
    config = {"_class_name": name, **NOISE, "steps_offset": 1, "clip_sample": False}
    changed, (line,) = as_trained(config, plan)
    assert changed["rescale_betas_zero_snr"] and "rescale_betas_zero_snr True" in line
    spacing = "trailing" if plan.velocity else "leading"
    assert changed["timestep_spacing"] == spacing and ("; DDIMScheduler, since" in line) == ("_class_name" in changed)
    kind = getattr(diffusers, changed.get("_class_name", name))
    scheduler = kind.from_config(config | changed)
    torch.testing.assert_close(scheduler.alphas_cumprod[:-1].double(), plan.alphas_cumprod[:-1], rtol=1e-4, atol=1e-7)
    x_0 = 3.0 * torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(drawn_by_an_exact_model(scheduler, plan, x_0), x_0, rtol=0.05, atol=0)
    assert as_trained(config | changed, plan) == ({}, [])


def test_a_schedule_that_is_not_rescaled_any_more():
    config = {"_class_name": "EulerDiscreteScheduler", **NOISE, "rescale_betas_zero_snr": True}
    changed, (line,) = as_trained(config, schedule.from_scheduler(config, zero_snr=False))
    assert changed == {"rescale_betas_zero_snr": False} and line.endswith("rescale_betas_zero_snr False")
    config["prediction_type"] = "v_prediction"
    assert as_trained(config, schedule.from_scheduler(config)) == ({}, [])


def test_a_class_that_would_not_read_its_own_setting():
    """PNDM ignores the setting that its config names; the training does not."""
    config = {
        "_class_name": "PNDMScheduler",
        **NOISE,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    assert as_trained(config, schedule.from_scheduler(config))[0]["_class_name"] == "DDIMScheduler"


def test_turbo_keeps_its_own_sampler(world):
    model = decided(world("sdxl-turbo"), zero_snr="on")
    assert model.resampled == {} and not model.scheduler_config.get("rescale_betas_zero_snr")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_v_prediction_with_zero_snr_draws_from_the_folder_what_the_run_draws(world, tmp_path, kind):
    model = decided(world(kind), prediction_type="v_prediction", zero_snr="on")
    save_pipeline(model, copy.deepcopy(model.denoiser), tmp_path)
    saved = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    config = saved.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert config.timestep_spacing == "trailing" and float(saved.scheduler.alphas_cumprod[-1]) < 1e-7
    assert np.array_equal(drawn(pipeline_of(model), 5.0), drawn(saved, 5.0))


# --- the settings are those of the source -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("single_file", [False, True])
@pytest.mark.parametrize(("kind", "zeros"), [("sdxl", False), ("sdxl-turbo", True)])
def test_the_source_says_how_an_empty_prompt_is_encoded(tmp_path, kind, zeros, single_file):
    """Against what one would guess from the name."""
    source = make_pipeline(tmp_path / "model", kind)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    own = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True)
    named, options = source, {}
    if single_file:
        named, options = write_single_file(source, tmp_path / "m.safetensors"), {"single_file_config": str(source)}
    _, model, _, _ = ready.load_model(change(Config(), model=str(named), **options), torch.device("cpu"))
    save_pipeline(model, model.denoiser, tmp_path / "out")
    saved = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert saved.config.force_zeros_for_empty_prompt is zeros
    own.unet = saved.unet  # a single file has the same weights; here only the settings count
    expected = drawn(own, 5.0)
    assert np.array_equal(drawn(pipeline_of(model), 5.0), expected) and np.array_equal(drawn(saved, 5.0), expected)

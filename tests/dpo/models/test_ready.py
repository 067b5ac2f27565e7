"""dpo.models.ready: dtypes of every precision, the device, and what the loaded model decides."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from dpo.common.errors import UserError
from dpo.models import ready
from dpo.models.load import load
from dpo.settings.config import Config, Runtime, change
from dpo.training.build import build

CPU = torch.device("cpu")


def test_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ready.pick_device("auto") == ready.pick_device("cpu") == CPU
    with pytest.raises(UserError, match="--device cuda:1: torch sees no GPU here"):
        ready.pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ready.pick_device("auto").type == "cuda"


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch):
    """Libraries, and whatever names no device, work on the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert ready.pick_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="--device cuda:2: torch sees 2 GPUs here, the last is cuda:1"):
        ready.pick_device("cuda:2")


@pytest.mark.parametrize(
    ("kind", "precision", "own", "vae", "text"),
    [
        ("sd15", "fp32", torch.float32, torch.float32, torch.float32),
        ("sd15", "bf16", torch.float32, torch.bfloat16, torch.bfloat16),
        ("sd15", "fp16", torch.float32, torch.float16, torch.float16),
        ("sd15", "fp64", torch.float64, torch.float64, torch.float64),
        ("sd15", "bf16-pure", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("sdxl", "bf16", torch.float32, torch.bfloat16, torch.bfloat16),
        ("sdxl", "fp16", torch.float32, torch.float32, torch.float16),
    ],
)
def test_dtypes(world, kind, precision, own, vae, text):
    model = load(world(kind))
    ready.cast(model, precision)
    assert (model.denoiser.dtype, model.vae.dtype) == (own, vae)
    assert {encoder.dtype for encoder in model.text_encoders} == {text}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "precision", "vae", "dtype"),
    [
        ("sdxl", "bf16", "fp32", torch.float32),  # as diffusers' SDXL script has it
        ("sdxl", "fp16", "fp16", torch.float16),  # as the Salesforce script has it
        ("sd15", "fp32", "bf16", torch.bfloat16),
    ],
)
def test_the_vae_may_have_a_precision_of_its_own(world, kind, precision, vae, dtype):
    model, alone = load(world(kind)), load(world(kind))
    ready.cast(model, precision, vae)
    ready.cast(alone, precision)
    assert model.vae.dtype == dtype != alone.vae.dtype
    others = [[model.denoiser.dtype, *(encoder.dtype for encoder in model.text_encoders)] for model in (model, alone)]
    assert others[0] == others[1]


def test_the_model_decides_what_is_left_open(world):
    config, model, plan, lines = ready.load_model(change(Config(), model=world("sd2v")), CPU)
    assert config.model.prediction_type == plan.prediction_type == model.prediction_type == "v_prediction"
    assert config.data.resolution == 32 and config.model.family == "sd" and lines
    assert next(model.denoiser.parameters()).dtype == torch.float32


def test_another_prediction_type_holds_for_all_that_reads_the_model(world):
    config = change(Config(), model=world("sd15"), prediction_type="v_prediction")
    _, model, plan, _ = ready.load_model(config, CPU)
    assert plan.prediction_type == model.prediction_type == model.scheduler_config["prediction_type"] == "v_prediction"


def test_policy_and_reference_are_settled_alike(world):
    """Layout, checkpointing and kernels as asked for; the module itself comes back where nothing is compiled."""
    denoiser = load(world("sd15")).denoiser
    runtime = Runtime(channels_last="on", checkpointing="mid_block", kernels="triton")
    assert ready.settle(runtime, denoiser, CPU) is denoiser
    assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert denoiser.mid_block.gradient_checkpointing and not denoiser.down_blocks[0].gradient_checkpointing
    assert "forward" in vars(denoiser.mid_block.resnets[0]), "runs on the kernels"


def test_a_flag_against_what_the_model_says_is_said(world, caplog):
    against = {"prediction_type": "epsilon", "zero_snr": "on"}
    _, _, plan, _ = ready.load_model(change(Config(), model=world("sd2v"), **against), CPU)
    assert plan.prediction_type == "epsilon" and plan.alphas_cumprod[-1] == 0
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "--prediction-type epsilon is followed, though the model says v_prediction" in said
    assert "--zero-snr on is followed, though the model says off" in said
    caplog.clear()
    ready.load_model(change(Config(), model=world("sd2v"), prediction_type="v_prediction", zero_snr="off"), CPU)
    assert "is followed" not in caplog.text


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (8, "--resolution 256: the model's own is 32 pixels, and a step takes 64 times as much, or more"),
        (2, "--resolution 64: the model's own is 32 pixels, and a step takes 4 times as much, or more"),
        (0.5, "--resolution 16: the model's own is 32 pixels, and it was not made for images so small"),
        (1.5, ""),
        (1, ""),
    ],
)
def test_a_resolution_far_from_the_models_own_is_said(world, caplog, share, said):
    ready.load_model(change(Config(), model=world("sd15"), resolution=int(32 * share)), CPU)
    found = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert found == ([said] if said else [])


def test_a_distilled_flow_that_is_trained_at_all_levels_is_called_so(world, caplog):
    with caplog.at_level(logging.WARNING, "dpo"):
        ready.load_model(change(Config(), model=world("flux2-klein"), timesteps="all", text_tokens=64), CPU)
    assert "--timesteps all is followed, though the model is distilled to a few steps" in caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("sd35", {"zero_snr": "on"}, "--zero-snr on: a flow's levels"),
        ("sd35", {"family": "flux"}, "is of family sd3, not flux"),
        ("qwen-image", {"train_guidance": 3.0}, "--train-guidance is for models that take"),
        ("sd15", {"text_tokens": 64}, "--text-tokens is for flow-matching models"),
        ("sd15", {"timestep_draw": "uniform"}, "--timestep-draw uniform draws noise levels of a flow"),
        ("flux2-klein", {"timestep_draw": "uniform"}, "the model has four timesteps, which are drawn alike"),
    ],
)
def test_settings_that_a_family_refuses_are_refused_before_pairs_are_read(world, tmp_path, kind, settings, said):
    """A folder of pairs that is not there would be named otherwise."""
    config = change(Config(), model=world(kind), data="nowhere", output=str(tmp_path / "run"), **settings)
    with pytest.raises(UserError, match=said):
        build(config, [])
    with pytest.raises(UserError, match="nowhere"):
        build(change(Config(), model=world(kind), data="nowhere", output=str(tmp_path / "run")), [])


@pytest.mark.parametrize("wrong", [{"timestep_spacing": "foo"}, {"_class_name": None, "timestep_spacing": 3}])
def test_a_scheduler_that_cannot_sample_is_said_before_the_training(world, tmp_path, wrong):
    model = Path(shutil.copytree(world("sd15"), tmp_path / "model"))
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | wrong), "utf-8")
    with pytest.raises(
        UserError, match=r"model: the scheduler cannot sample \(.* is not supported.*\); mend"
    ) as caught:
        ready.load_model(change(Config(), model=str(model)), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_name_alone_makes_no_four_step_model(world, tmp_path):
    """The scheduler decides; where only the name says Turbo, the flag is asked for."""
    named = shutil.copytree(world("sdxl"), tmp_path / "my-turbo")
    with pytest.raises(UserError, match="say --timesteps turbo if .* else --timesteps all"):
        ready.load_model(change(Config(), model=str(named)), CPU)
    for asked in ("turbo", "all"):
        config, _, plan, _ = ready.load_model(change(Config(), model=str(named), timesteps=asked), CPU)
        assert config.model.timesteps == asked and (plan.chain is not None) == (asked == "turbo")
    unnamed = shutil.copytree(world("sdxl-turbo"), tmp_path / "my-model")
    assert ready.load_model(change(Config(), model=str(unnamed)), CPU)[2].chain == (249, 499, 749, 999)

"""dpo.models.checks: what the training step does not fit is refused from configs and headers, before weights are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dpo.models.load
from dpo.common.errors import UserError
from dpo.models.checks import finite
from dpo.models.load import load, load_weights_into
from tests.help.ldm import write_single_file
from tests.help.loading import refused

UNET, VAE, TEXT, TEXT_2 = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
)
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def copies(pipelines, tmp_path):
    return lambda kind: Path(shutil.copytree(pipelines[kind], tmp_path / kind))


def change(path: Path, **changes) -> None:
    """Writes the settings over those of a config; None takes one out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


CONFIGS = {
    "inpainting": ("sd15", UNET, {"in_channels": 9}, "an inpainting model"),
    "instruct-pix2pix": ("sd15", UNET, {"in_channels": 8}, "instruct-pix2pix"),
    "depth": ("sd15", UNET, {"in_channels": 5}, "depth-to-image"),
    "learned variance": ("sd15", UNET, {"out_channels": 8}, "takes 4 channels and gives 8, but the latents of the VAE have 4"),
    "VAE channels": ("sd15", VAE, {"latent_channels": 16}, "the latents of the VAE have 16"),
    "text width": ("sd15", TEXT, {"hidden_size": 48}, "takes text of width 32, but text_encoder give 48"),
    "text widths": ("sdxl", TEXT, {"hidden_size": 48}, "takes text of width 48, but text_encoder and text_encoder_2 give 48 + 16"),
    "pooled width": ("sdxl", TEXT_2, {"projection_dim": 40}, "takes 72 numbers for pooled text and sizes, but is given 88"),
    "refiner": ("sdxl", UNET, {"projection_class_embeddings_input_dim": 5 * 8 + 24}, "five sizes: the SDXL refiner"),
    "SDXL without its own input": ("sdxl", UNET, {"addition_embed_type": None}, "where SDXL's is text_time"),
    "SD with another input": ("sd15", UNET, {"addition_embed_type": "text_image"}, "addition_embed_type text_image"),
    "LCM": ("sd15", UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256: the UNet of a distilled model (LCM)"),
    "upscaler": ("sd15", UNET, {"num_class_embeds": 1000}, "num_class_embeds 1000"),
    "class embeddings": ("sd15", UNET, {"class_embed_type": "projection"}, "class_embed_type projection"),
    "image embeddings": ("sd15", UNET, {"encoder_hid_dim": 64}, "encoder_hid_dim 64"),
    "scaled channels": ("sdxl", VAE, {"latents_mean": [-1.6, 1.1, 2.8, -0.3]}, "scales each channel"),
    "shifted latents": ("sd15", VAE, {"shift_factor": 0.1}, "shift_factor 0.1"),
    "unknown scale": ("sdxl", VAE, {"scaling_factor": None}, "no scaling_factor"),
    "no side": ("sd15", UNET, {"sample_size": None}, "sample_size None"),
    "another VAE": ("sd15", VAE, {"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny"),
    "EDM": ("sdxl", SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "by no schedule of betas"),
    "no betas": ("sd15", SCHEDULER, {"beta_schedule": None}, "says no beta_schedule"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_refused_from_the_configs_before_weights_are_read(copies, monkeypatch, kind, file, changes, words):
    folder = copies(kind)
    change(folder / file, **changes)
    monkeypatch.setattr(dpo.models.load, "component", lambda *a: pytest.fail("weights were read"))
    assert words in refused(str(folder))


def test_another_vae_is_checked_too(copies, pipelines, tmp_path):
    vae = Path(shutil.copytree(pipelines["sd15"] / "vae", tmp_path / "vae"))
    change(vae / "config.json", shift_factor=0.1)
    assert "shift_factor 0.1" in refused(str(pipelines["sd15"]), vae=str(vae))


def test_old_configs_mean_what_their_classes_declare(copies):
    """SD 1.x was published without the VAE's scaling_factor and the scheduler's prediction_type."""
    folder = copies("sd15")
    change(folder / VAE, scaling_factor=None, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    change(folder / SCHEDULER, prediction_type=None, num_train_timesteps=None)
    model = load(str(folder))
    assert model.vae.config["scaling_factor"] == 0.18215 and model.prediction_type == "epsilon"
    assert model.scheduler_config["num_train_timesteps"] == 1000
    assert [line.split(":")[0] for line in model.notes] == [
        "the model's scheduler says no num_train_timesteps",
        "the model's scheduler says no prediction_type",
        "the VAE's config has no scaling_factor",
    ]


def altered(path: Path, name: str, value) -> None:
    weights = load_file(path)
    weights[name] = value(weights[name])
    save_file(weights, path, metadata={"format": "pt"})


def spoilt(number: float):
    def spoil(value: torch.Tensor) -> torch.Tensor:
        value.view(-1)[-1] = number
        return value

    return spoil


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "conv_out.bias"), ("vae", "decoder.conv_out.bias"), ("text_encoder", None)]
)
def test_a_value_that_is_not_finite_is_named(copies, part, name):
    folder = copies("sd15")
    path = next((folder / part).glob("*.safetensors"))
    name = name or sorted(load_file(path))[0]
    altered(path, name, spoilt(float("nan" if part == "unet" else "inf")))
    message = refused(str(folder))
    assert f"/{part} has NaN or infinity in " in message and name.removeprefix("text_model.") in message


def test_not_finite_in_a_single_file_and_in_a_unet_to_start_from(copies, pipelines, tmp_path):
    folder = copies("sd15")
    path = write_single_file(folder, tmp_path / "model.safetensors")
    altered(path, "model.diffusion_model.out.2.bias", spoilt(float("nan")))
    assert "the unet has NaN or infinity in conv_out.bias" in refused(str(path), single_file_config=str(folder))
    unet = next((folder / "unet").glob("*.safetensors"))
    altered(unet, "conv_out.bias", spoilt(float("nan")))
    denoiser = load(str(pipelines["sd15"])).denoiser
    for source in (unet, folder):
        with pytest.raises(UserError, match="NaN or infinity in conv_out.bias"):
            load_weights_into(denoiser, str(source))


def test_a_sum_that_overflows_is_no_infinity():
    finite({"large": torch.full((4,), 2e38)}, "a file")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_without_their_scales(copies, tmp_path, dtype):
    folder = copies("sd15")
    one = write_single_file(folder, tmp_path / "model.safetensors")
    altered(one, "model.diffusion_model.out.2.bias", lambda value: value.to(dtype))
    assert "holds quantised weights (model.diffusion_model.out.2.bias" in refused(
        str(one), single_file_config=str(folder)
    )
    altered(next((folder / "unet").glob("*.safetensors")), "conv_out.bias", lambda value: value.to(dtype))
    assert "holds quantised weights (conv_out.bias as" in refused(str(folder))

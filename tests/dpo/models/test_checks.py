"""dpo.models.checks: what the training step does not fit is refused from configs and headers, before weights are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models.checks import DEFAULTED, check, filled, finite
from dpo.models.family import families
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
QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}


@pytest.fixture
def copies(pipelines, tmp_path):
    return lambda kind: Path(shutil.copytree(pipelines[kind], tmp_path / kind))


NULL = object()


def change(path: Path, **changes) -> None:
    """Writes the settings over those of a config; None takes one out, NULL writes null."""
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps({key: None if value is NULL else value for key, value in config.items()}))


def without_weights(folder: Path) -> str:
    """`folder` after its weight files are gone: what is said of it comes from the other files."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return str(folder)


CONFIGS = {
    "inpainting": ("sd15", UNET, {"in_channels": 9}, "an inpainting model"),
    "instruct-pix2pix": ("sd15", UNET, {"in_channels": 8}, "instruct-pix2pix"),
    "upscaler by its channels": ("sd15", UNET, {"in_channels": 7}, "an upscaler"),
    "depth": ("sd15", UNET, {"in_channels": 5}, "depth-to-image"),
    "learned variance": ("sd15", UNET, {"out_channels": 8}, "takes 4 channels and gives 8, but the latents of the VAE have 4"),
    "VAE channels": ("sd15", VAE, {"latent_channels": 16}, "the latents of the VAE have 16"),
    "text width": ("sd15", TEXT, {"hidden_size": 48}, "takes text of width 32, but text_encoder gives 48"),
    "text widths": ("sdxl", TEXT, {"hidden_size": 48}, "takes text of width 48, but text_encoder and text_encoder_2 give 48 + 16"),
    "pooled width": ("sdxl", TEXT_2, {"projection_dim": 40}, "takes 72 numbers for pooled text and sizes, but is given 88"),
    "refiner": ("sdxl", UNET, {"projection_class_embeddings_input_dim": 5 * 8 + 24}, "is the SDXL refiner"),
    "SDXL without its own input": ("sdxl", UNET, {"addition_embed_type": None}, "has addition_embed_type None: text_time is expected"),
    "SD with another input": ("sd15", UNET, {"addition_embed_type": "text_image"}, "addition_embed_type text_image"),
    "LCM": ("sd15", UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256: the UNet of a distilled model (LCM)"),
    "upscaler": ("sd15", UNET, {"num_class_embeds": 1000}, "num_class_embeds 1000"),
    "class embeddings": ("sd15", UNET, {"class_embed_type": "projection"}, "class_embed_type projection"),
    "image embeddings": ("sd15", UNET, {"encoder_hid_dim": 64}, "encoder_hid_dim 64"),
    "scaled channels": ("sdxl", VAE, {"latents_mean": [-1.6, 1.1, 2.8, -0.3]}, "scales each channel"),
    "shifted latents": ("sd15", VAE, {"shift_factor": 0.1}, "shift_factor 0.1"),
    "unknown scale": ("sdxl", VAE, {"scaling_factor": None}, "no scaling_factor"),
    "no scale": ("sd15", VAE, {"scaling_factor": NULL}, "scaling_factor None: a number above 0 is expected"),
    "no side": ("sd15", UNET, {"sample_size": None}, "sample_size None: a whole number above 0 is expected"),
    "two sides": ("sd15", UNET, {"sample_size": [8, 8]}, "sample_size [8, 8]: a whole number"),
    "channels in words": ("sd15", UNET, {"in_channels": "4"}, "in_channels 4: a whole number"),
    "latents in words": ("sd15", VAE, {"latent_channels": "4"}, "latent_channels 4: a whole number"),
    "no size embedding": ("sdxl", UNET, {"addition_time_embed_dim": None}, "addition_time_embed_dim None: a whole"),
    "no pooled text": ("sdxl", UNET, {"projection_class_embeddings_input_dim": None}, "_input_dim None: a whole number"),
    "quantised UNet": ("sd15", UNET, QUANTISED, "the unet's weights are quantised (bitsandbytes, in its config)"),
    "quantised VAE": ("sd15", VAE, QUANTISED, "the vae's weights are quantised"),
    "quantised text encoder": ("sdxl", TEXT_2, QUANTISED, "the text_encoder_2's weights are quantised"),
    "another VAE": ("sd15", VAE, {"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny"),
    "EDM": ("sdxl", SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "by no schedule of betas"),
    "no betas": ("sd15", SCHEDULER, {"beta_schedule": None}, "says no beta_schedule"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_refused_from_the_configs_before_weights_are_read(copies, kind, file, changes, words):
    folder = copies(kind)
    change(folder / file, **changes)
    assert words in refused(without_weights(folder))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("sd15", {"shift_factor": 0.1}, "shift_factor 0.1"),
        ("sd15", {"latent_channels": 16}, "the latents of the VAE have 16"),
        ("sd15", {"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny"),
        ("sd15", QUANTISED, "the vae's weights are quantised"),
        ("sdxl", {"scaling_factor": None}, "no scaling_factor"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_another_vae_is_checked_too(copies, pipelines, tmp_path, whole, kind, changes, words):
    other = Path(shutil.copytree(pipelines[kind] / "vae", tmp_path / "other" / "vae"))
    change(other / "config.json", **changes)
    vae = without_weights(other.parent if whole else other)
    assert words in (message := refused(without_weights(copies(kind)), vae=vae)) and vae in message


OTHERS = {
    "StableDiffusionInpaintPipeline": "an inpainting model",
    "StableDiffusionXLInpaintPipeline": "an inpainting model",
    "StableDiffusionInstructPix2PixPipeline": "an image-editing model",
    "StableDiffusionDepth2ImgPipeline": "a depth-to-image model",
    "StableDiffusionUpscalePipeline": "an upscaler",
    "LatentConsistencyModelPipeline": "a distilled model (LCM)",
}


@pytest.mark.parametrize(("name", "words"), OTHERS.items(), ids=OTHERS)
def test_another_pipeline_is_named_for_what_it_is(copies, name, words):
    folder = copies("sd15")
    change(folder / "model_index.json", _class_name=name)
    assert words in (message := refused(without_weights(folder))) and name in message


@pytest.mark.parametrize("family", ["auto", "sdxl"])
def test_the_refiner_as_it_is_published(copies, family):
    folder, absent = copies("sdxl"), [None, None]
    refiner = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    change(folder / "model_index.json", text_encoder=absent, tokenizer=absent, **refiner)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    assert "is the SDXL refiner" in refused(without_weights(folder), family=family)


SINGLE = {
    "shifted latents": ("sd15", VAE, {"shift_factor": 0.1}, "shift_factor 0.1"),
    "no scale": ("sd15", VAE, {"scaling_factor": NULL}, "scaling_factor None"),
    "unknown scale": ("sdxl", VAE, {"scaling_factor": None}, "no scaling_factor"),
    "two sides": ("sd15", UNET, {"sample_size": [8, 8]}, "sample_size [8, 8]"),
    "image embeddings": ("sd15", UNET, {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32}, "encoder_hid_dim"),
    "another text": ("sd15", UNET, {"cross_attention_dim": 48}, "takes text of width 48, but text_encoder gives 32"),
    "quantised UNet": ("sd15", UNET, QUANTISED, "the unet's weights are quantised"),
}


@pytest.mark.parametrize(("kind", "file", "changes", "words"), SINGLE.values(), ids=SINGLE)
def test_a_single_file_is_checked_by_the_configuration_that_it_gets(copies, tmp_path, kind, file, changes, words):
    folder = copies(kind)
    path = write_single_file(folder, tmp_path / "model.safetensors")
    change(folder / file, **changes)
    message = refused(str(path), single_file_config=without_weights(folder))
    assert words in message and str(path) in message


# The settings that the checks ask for, as the published config.json have them; the rest is the classes' own.
SD1 = {
    "unet": {"sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
    "vae": {"latent_channels": 4, "sample_size": 512},  # 1.x came without a scaling_factor
    "text_encoder": {"hidden_size": 768, "projection_dim": 768},
}
NULLS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim")
XL = {
    "unet": dict.fromkeys(NULLS)
    | {"sample_size": 128, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048}
    | {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    | {"projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10]},
    "vae": {"latent_channels": 4, "scaling_factor": 0.13025, "latents_mean": None, "latents_std": None},
    "text_encoder": {"hidden_size": 768, "projection_dim": 768},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280},
}
PUBLISHED = {
    "SD 1.4 and 1.5": ("sd", SD1),
    "SD 2.1 base": (
        "sd",
        {
            "unet": dict.fromkeys(NULLS) | {"sample_size": 64, "cross_attention_dim": 1024, "dual_cross_attention": False},
            "vae": {"latent_channels": 4, "scaling_factor": 0.18215},
            "text_encoder": {"hidden_size": 1024, "projection_dim": 512},
        },
    ),
    "SD 2.1": (
        "sd",
        {
            "unet": dict.fromkeys(NULLS) | {"sample_size": 96, "cross_attention_dim": 1024, "upcast_attention": True},
            "vae": {"latent_channels": 4, "scaling_factor": 0.18215},
            "text_encoder": {"hidden_size": 1024, "projection_dim": 512},
        },
    ),
    "SDXL": ("sdxl", XL),
    "SDXL-Turbo": ("sdxl", XL | {"unet": XL["unet"] | {"sample_size": 64}}),
    "SDXL with the VAE for fp16": ("sdxl", XL | {"vae": XL["vae"] | {"force_upcast": False, "sample_size": 512}}),
}  # fmt: skip


def of_classes(family: str, parts: dict) -> dict:
    """Configs as `load` hands them to the checks: the published settings over the defaults of the classes."""
    import diffusers
    from transformers import CLIPTextConfig

    configs = {name: CLIPTextConfig(**config).to_dict() for name, config in parts.items() if name.startswith("text")}
    configs["unet"] = filled(getattr(diffusers, families()[family].denoiser_class), parts["unet"])
    return configs | {"vae": filled(getattr(diffusers, families()[family].vae_class), parts["vae"])}


@pytest.mark.parametrize(("family", "parts"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_pass(family, parts):
    check(families()[family].checks, of_classes(family, parts), "a model")


def test_the_published_refiner_and_mixed_models_do_not_pass():
    checks, turned = families()["sdxl"].checks, of_classes("sdxl", XL)
    turned["unet"] |= {"projection_class_embeddings_input_dim": 5 * 256 + 1280}
    with pytest.raises(UserError, match="is the SDXL refiner"):
        check(checks, turned, "a model")
    with pytest.raises(UserError, match="takes text of width 1024, but text_encoder gives 768"):
        check(
            families()["sd"].checks,
            of_classes("sd", PUBLISHED["SD 2.1"][1] | {"text_encoder": SD1["text_encoder"]}),
            "a model",
        )
    assert DEFAULTED in of_classes("sd", SD1)["vae"]


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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "--vae"])
def test_quantised_weights_are_seen_in_the_header_before_any_are_read(copies, pipelines, tmp_path, monkeypatch, part):
    folder = copies("sd15")
    other = Path(shutil.copytree(pipelines["sd15"] / "vae", tmp_path / "other"))
    path = next((other if part == "--vae" else folder / part).glob("*.safetensors"))
    altered(path, sorted(load_file(path))[0], lambda value: value.to(torch.int8))
    monkeypatch.setattr("dpo.models.load.component", lambda *a: pytest.fail("weights were read"))
    options = {"vae": str(other)} if part == "--vae" else {}
    assert f"{path} holds quantised weights" in refused(str(folder), **options)


def test_a_quantised_variant_that_is_not_read_is_no_matter(copies):
    folder = copies("sd15")
    path = next((folder / "unet").glob("*.safetensors"))
    shutil.copy(path, other := path.with_name("diffusion_pytorch_model.int8.safetensors"))
    altered(other, "conv_out.bias", lambda value: value.to(torch.int8))
    assert load(str(folder)).denoiser.conv_out.bias.dtype == torch.float32
    assert f"{other} holds quantised weights" in refused(str(folder), variant="int8")


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

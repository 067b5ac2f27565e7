"""dpo.models.load: every family from its folder; each way in which that fails is one line."""

import json
import shutil
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models import load as load_module
from dpo.models.load import load, load_weights_into
from dpo.models.parts import variants
from tests.help.ldm import weights_of, write_single_file
from tests.help.loading import refused
from tests.help.worlds import KINDS, make_pipeline


@pytest.fixture
def broken(pipelines, tmp_path) -> Path:
    """A copy of the sd15 pipeline to damage."""
    shutil.copytree(pipelines["sd15"], tmp_path / "model")
    return tmp_path / "model"


# --- what loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_family(pipelines, kind):
    model = load(str(pipelines[kind]))
    xl = kind.startswith("sdxl")
    assert model.family.name == ("sdxl" if xl else "sd")
    assert len(model.text_encoders) == len(model.tokenizers) == (2 if xl else 1)
    assert model.turbo is (kind == "sdxl-turbo")
    assert model.scheduler_config.get("prediction_type", "epsilon") == ("v_prediction" if kind == "sd2v" else "epsilon")
    assert model.geometry.vae_scale == 4 and model.geometry.native == 32
    assert model.folder == pipelines[kind] and model.source == str(pipelines[kind])
    for module, name in ((model.denoiser, "unet"), (model.vae, "vae")):
        stored = weights_of(pipelines[kind] / name)
        assert stored.keys() == module.state_dict().keys()
        assert all(torch.equal(module.state_dict()[key], value) for key, value in stored.items())
    for module in (model.denoiser, model.vae, *model.text_encoders):
        assert not module.training and all(
            not p.requires_grad and p.dtype == torch.float32 for p in module.parameters()
        )


def halved(folder: Path, variant: str = "fp16") -> None:
    """Stores a component's weights as a half-precision variant alone."""
    (path,) = folder.glob("*.safetensors")
    half = {key: value.half() for key, value in load_file(path).items()}
    path.unlink()
    save_file(half, path.with_name(f"{path.stem}.{variant}.safetensors"), metadata={"format": "pt"})


HALVES = {
    "all": ("unet", "vae", "text_encoder"),
    "unet": ("unet",),
    "text encoder": ("text_encoder",),
}


@pytest.mark.parametrize("asked", ["fp16", None])
@pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)
def test_half_precision_variants_and_mixtures_with_plain_files(pipelines, broken, caplog, asked, halves):
    for name in halves:
        halved(broken / name)
    with caplog.at_level("INFO", "dpo"):
        model = load(str(broken), variant=asked)
    for name, module in (("unet", model.denoiser), ("vae", model.vae)):
        wanted = weights_of(pipelines["sd15"] / name)
        wanted = {key: value.half().float() if name in halves else value for key, value in wanted.items()}
        assert all(torch.equal(value, wanted[key]) for key, value in module.state_dict().items())
        assert module.dtype == torch.float32
    other = {"unet", "vae", "text_encoder"} - set(halves) if asked else halves
    said = [record.message for record in caplog.records if "its" in record.message]
    assert len(said) == len(other) and all(any(f"/{name} has no" in line for line in said) for name in other)


def test_a_variant_that_is_there_is_taken_and_a_choice_is_the_users(broken):
    (path,) = (broken / "unet").glob("*.safetensors")
    plain = load_file(path)
    save_file({key: value + 1 for key, value in plain.items()}, path.with_name(f"{path.stem}.fp16.safetensors"))
    assert torch.equal(load(str(broken)).denoiser.conv_in.bias, plain["conv_in.bias"])
    assert torch.equal(load(str(broken), variant="fp16").denoiser.conv_in.bias, plain["conv_in.bias"] + 1)
    message = refused(str(broken), variant="fp61")
    assert "cannot load variant fp61 of" in message and "leave out --variant" in message
    path.rename(path.with_name(f"{path.stem}.ema.safetensors"))
    path.with_name(f"{path.stem}.fp16.safetensors").rename(path.with_name(f"{path.stem}.bf16.safetensors"))
    assert "variants bf16, ema: name one with --variant" in refused(str(broken))
    assert torch.equal(load(str(broken), variant="ema").denoiser.conv_in.bias, plain["conv_in.bias"])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors", "config.json"], {""}),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], {"fp16"}),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "model-00001-of-00002.safetensors"], {"fp16", ""}),
        (["diffusion_pytorch_model.non_ema.safetensors", "pytorch_model.bin"], {"non_ema"}),
    ],
)
def test_variants_by_their_files(tmp_path, names, found):
    for name in names:
        (tmp_path / name).touch()
    assert variants(tmp_path) == found


@pytest.mark.parametrize("whole", [True, False])
def test_another_vae(pipelines, tmp_path, whole):
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    model = load(str(pipelines["sd15"]), vae=str(other if whole else other / "vae"))
    wanted = weights_of(other / "vae")
    assert all(torch.equal(value, wanted[key]) for key, value in model.vae.state_dict().items())
    assert not all(
        torch.equal(value, wanted[key]) for key, value in load(str(pipelines["sd15"])).vae.state_dict().items()
    )


@pytest.mark.parametrize("layout", ["original", "whole checkpoint", "diffusers", "former diffusers"])
@pytest.mark.parametrize("model", ["folder", "file"])
def test_another_vae_as_one_file(pipelines, tmp_path, layout, model):
    """It takes the configuration of the VAE that it replaces, the scale of the latents among it."""
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    wanted = weights_of(other / "vae")
    path = write_single_file(other, tmp_path / "vae.safetensors")
    if layout == "original":
        weights = {key: value for key, value in load_file(path).items() if key.startswith("first_stage_model.")}
        save_file({key.removeprefix("first_stage_model."): value for key, value in weights.items()}, path)
    elif "diffusers" in layout:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if "former" in layout else {}
        save_file(
            {reduce(lambda key, old: key.replace(old, names[old]), names, key): wanted[key] for key in wanted}, path
        )
    named, options = str(pipelines["sd15"]), {}
    if model == "file":
        options = {"single_file_config": named}
        named = str(write_single_file(pipelines["sd15"], tmp_path / "model.safetensors"))
    vae = load(named, vae=str(path), **options).vae
    assert vae.config.scaling_factor == 0.18215 and vae.dtype == torch.float32 and not vae.training
    state = vae.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in state.items())
    assert not any(p.requires_grad for p in vae.parameters())


def test_a_tokenizer_that_wants_another_package_names_it(pipelines, monkeypatch):
    def fails(*given):
        raise ValueError(
            "Cannot instantiate this tokenizer from a slow version. ... make sure you have sentencepiece installed."
        )

    monkeypatch.setattr(load_module, "read_tokenizer", fails)
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="; pip install sentencepiece protobuf, or transformers 5"):
        load(str(pipelines["sd15"]))


def in_cache(cache: Path, name: str, folder: Path) -> None:
    """`folder` as the hub's client keeps the repository `name`."""
    kept = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)


def test_parts_from_the_hub_are_kept_where_cache_dir_says(pipelines, tmp_path):
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    in_cache(tmp_path / "kept", "owner/vae", other / "vae")
    in_cache(tmp_path / "kept", "owner/model", other)
    kept = str(tmp_path / "kept")
    model = load(str(pipelines["sd15"]), vae="owner/vae", cache_dir=kept)
    load_weights_into(model.denoiser, "owner/model", cache_dir=kept)
    for module, name in ((model.vae, "vae"), (model.denoiser, "unet")):
        wanted = weights_of(other / name)
        assert all(torch.equal(value, wanted[key]) for key, value in module.state_dict().items())
    assert "owner/vae" in refused(str(pipelines["sd15"]), vae="owner/vae")  # not in the usual place


# --- what does not load -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "", "\x00\x01"])
def test_damaged_index(broken, text):
    (broken / "model_index.json").write_text(text)
    assert "model_index.json cannot be read" in refused(str(broken))


@pytest.mark.parametrize("value", [[], "text", 3])
def test_index_that_is_no_index(broken, value):
    (broken / "model_index.json").write_text(json.dumps(value))
    assert "model_index.json" in refused(str(broken))


def test_unknown_family(broken):
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaPipeline"}))
    message = refused(str(broken))
    assert "unknown model family 'SanaPipeline'" in message and "StableDiffusionXLPipeline" in message


def test_missing_or_damaged_scheduler(broken):
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text("{nonsense")
    assert "scheduler_config.json" in refused(str(broken))
    shutil.rmtree(path.parent)
    message = refused(str(broken))
    assert message.count("scheduler_config.json") == 1 and "(No such file or directory): the noise schedule" in message


def test_missing_or_damaged_tokenizer(broken):
    for path in (broken / "tokenizer").iterdir():
        path.write_text("{nonsense")
    assert "tokenizer" in refused(str(broken))
    shutil.rmtree(broken / "tokenizer")
    assert "has no tokenizer/ folder" in refused(str(broken))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused(broken, name, monkeypatch):
    (path,) = (broken / name).glob("*.safetensors")
    loaded = load_file(path)
    path.unlink()
    pickled = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(loaded, broken / name / pickled)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    assert f"/{name}" in refused(str(broken))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_truncated_weights(broken, name):
    (path,) = (broken / name).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"/{name}" in refused(str(broken))


def test_missing_component(broken):
    shutil.rmtree(broken / "unet")
    assert "/unet" in refused(str(broken))


def test_weights_of_another_shape(broken):
    config = json.loads((broken / "unet" / "config.json").read_text())
    (broken / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 48]}))
    assert "/unet" in refused(str(broken))


def test_missing_tensor(broken):
    """diffusers would fill it with random numbers and go on."""
    (path,) = (broken / "unet").glob("*.safetensors")
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "conv_in.weight" in refused(str(broken))


def test_no_such_vae(pipelines, tmp_path):
    assert "nowhere" in refused(str(pipelines["sd15"]), vae=str(tmp_path / "nowhere"))
    (unet,) = (pipelines["sd15"] / "unet").glob("*.safetensors")
    assert "--vae" in (message := refused(str(pipelines["sd15"]), vae=str(unet))) and "the model's VAE" in message


# --- another UNet to start from -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pipeline", "unet folder", "file"])
def test_start_from_another_unet(pipelines, tmp_path, form):
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    (file,) = (other / "unet").glob("*.safetensors")
    unet = load(str(pipelines["sd15"])).denoiser
    before = unet.conv_in.weight.clone()
    load_weights_into(unet, str({"pipeline": other, "unet folder": other / "unet", "file": file}[form]))
    wanted = load_file(file)
    assert all(torch.equal(value, wanted[name]) for name, value in unet.state_dict().items())
    assert not torch.equal(unet.conv_in.weight, before)


def test_start_from_a_unet_that_does_not_fit(pipelines, tmp_path):
    unet = load(str(pipelines["sd15"])).denoiser
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors here")
    extra = tmp_path / "extra.safetensors"
    save_file({**before, "one.more": torch.zeros(1)}, extra)
    wrong = {
        str(pipelines["sdxl"]): "of another architecture.*first mismatch",
        str(pipelines["sd2v"] / "unet"): "of another architecture.*first mismatch",
        str(extra): "another architecture.*one.more",
        str(bad): "cannot be read as safetensors",
        str(tmp_path / "nowhere"): "no such folder or file",
        "nobody/no-such-unet": "nobody/no-such-unet",
    }
    for source, message in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            load_weights_into(unet, source)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_scheduler_that_is_refused_names_its_model(broken):
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps({"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"})
    )
    assert refused(str(broken)).startswith(f"{broken}: the model's scheduler EDMEulerScheduler adds noise")

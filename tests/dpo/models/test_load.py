"""dpo.models.load: every family from its folder; each way in which that fails is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models.load import load, load_weights_into
from tests.help.ldm import weights_of
from tests.help.loading import refused
from tests.help.worlds import KINDS, make_pipeline


@pytest.fixture
def broken(pipelines, tmp_path) -> Path:
    """A copy of the sd15 pipeline to damage."""
    shutil.copytree(pipelines["sd15"], tmp_path / "model")
    return tmp_path / "model"


# --- what loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(pipelines, kind):
    model = load(str(pipelines[kind]))
    xl = kind.startswith("sdxl")
    assert model.family.name == ("sdxl" if xl else "sd")
    assert len(model.text_encoders) == len(model.tokenizers) == (2 if xl else 1)
    assert model.turbo is (kind == "sdxl-turbo")
    assert model.scheduler_config.get("prediction_type", "epsilon") == ("v_prediction" if kind == "sd2v" else "epsilon")
    assert model.vae_scale == 4 and model.native_resolution == 32
    assert model.folder == pipelines[kind] and model.source == str(pipelines[kind])
    for module, name in ((model.denoiser, "unet"), (model.vae, "vae")):
        stored = weights_of(pipelines[kind] / name)
        assert stored.keys() == module.state_dict().keys()
        assert all(torch.equal(module.state_dict()[key], value) for key, value in stored.items())
    for module in (model.denoiser, model.vae, *model.text_encoders):
        assert not module.training and all(
            not p.requires_grad and p.dtype == torch.float32 for p in module.parameters()
        )


def test_half_precision_variant(pipelines, broken):
    for name in ("unet", "vae", "text_encoder"):
        (path,) = (broken / name).glob("*.safetensors")
        half = {key: value.half() for key, value in load_file(path).items()}
        path.unlink()
        save_file(half, path.with_name(path.stem + ".fp16.safetensors"), metadata={"format": "pt"})
    message = refused(str(broken))
    assert "fp16" in message
    model = load(str(broken), variant="fp16")
    assert model.denoiser.dtype == torch.float32
    stored = weights_of(pipelines["sd15"] / "unet")
    assert all(torch.equal(value, stored[key].half().float()) for key, value in model.denoiser.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_another_vae(pipelines, tmp_path, whole):
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    model = load(str(pipelines["sd15"]), vae=str(other if whole else other / "vae"))
    wanted = weights_of(other / "vae")
    assert all(torch.equal(value, wanted[key]) for key, value in model.vae.state_dict().items())
    assert not all(
        torch.equal(value, wanted[key]) for key, value in load(str(pipelines["sd15"])).vae.state_dict().items()
    )


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
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    message = refused(str(broken))
    assert "unknown model family 'FluxPipeline'" in message and "StableDiffusionXLPipeline" in message


def test_missing_or_damaged_scheduler(broken):
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text("{nonsense")
    assert "scheduler_config.json" in refused(str(broken))
    shutil.rmtree(path.parent)
    message = refused(str(broken))
    assert "scheduler_config.json" in message and "must come with the model" in message


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

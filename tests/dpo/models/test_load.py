"""dpo.models.load: every family from folder and single file; each way in which that fails is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models.fingerprint import fingerprint
from dpo.models.load import load, load_weights_into
from tests.help.ldm import weights_of, write_single_file
from tests.help.worlds import KINDS, make_pipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: make_pipeline(root / kind, kind) for kind in KINDS}


@pytest.fixture
def broken(pipelines, tmp_path) -> Path:
    """A copy of the sd15 pipeline to damage."""
    shutil.copytree(pipelines["sd15"], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the hub, whatever the environment says."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refused(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


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
        assert not module.training and all(not p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_captions_become_conditioning(pipelines, kind):
    model = load(str(pipelines[kind]))
    text = model.family.encode(model, ["a fox", "", "a fox"])
    assert text.hidden.shape == (3, 77, model.denoiser.config.cross_attention_dim)
    assert torch.equal(text.hidden[0], text.hidden[2]) and not torch.equal(text.hidden[0], text.hidden[1])
    micro = torch.tensor([[32, 32, 0, 0, 32, 32]] * 6)
    with torch.no_grad():
        both = text.twice()
        out = model.family.predict(model.denoiser, torch.zeros(6, 4, 8, 8), torch.tensor([7] * 6), both, micro)
    assert out.shape == (6, 4, 8, 8) and torch.equal(both.hidden[:3], both.hidden[3:])
    if kind.startswith("sdxl"):
        with pytest.raises(ValueError, match="micro-conditioning"):
            model.family.predict(model.denoiser, torch.zeros(3, 4, 8, 8), torch.tensor([7] * 3), text, None)


def test_captions_encode_as_diffusers_does(pipelines):
    import diffusers

    for kind in ("sd15", "sdxl"):
        model = load(str(pipelines[kind]))
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines[kind])
        result = pipe.encode_prompt("a lamp in rain", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        text = model.family.encode(model, ["a lamp in rain"])
        torch.testing.assert_close(text.hidden, result[0])
        if kind == "sdxl":
            torch.testing.assert_close(text.pooled, result[2])


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
    assert not all(torch.equal(value, wanted[key]) for key, value in load(str(pipelines["sd15"])).vae.state_dict().items())


# --- single files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sd2v", "sdxl"])
def test_single_file_in_the_original_layout(pipelines, tmp_path, kind):
    path = write_single_file(pipelines[kind], tmp_path / "model.safetensors")
    assert all(not name.startswith("unet.") for name in load_file(path))
    one, many = load(str(path), single_file_config=str(pipelines[kind])), load(str(pipelines[kind]))
    assert one.family.name == many.family.name and one.folder is None and len(one.tokenizers) == len(many.tokenizers)
    pairs = zip([one.denoiser, one.vae, *one.text_encoders], [many.denoiser, many.vae, *many.text_encoders], strict=True)
    for ours, expected in pairs:
        ours, expected = ours.state_dict(), expected.state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], value) and value.dtype == torch.float32 for name, value in expected.items())
    assert one.scheduler_config["beta_schedule"] == many.scheduler_config["beta_schedule"]
    assert one.scheduler_config.get("prediction_type") == many.scheduler_config.get("prediction_type", "epsilon")
    assert not any(p.requires_grad for p in one.denoiser.parameters())


def test_single_files_that_are_refused(pipelines, tmp_path):
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    assert "is not a .safetensors file; convert" in refused(str(pickled))
    whole = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    assert "cannot be read" in refused(str(cut))
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    assert "cannot be read" in refused(str(empty))
    unet = next((pipelines["sd15"] / "unet").glob("*.safetensors"))
    assert "not a whole Stable Diffusion checkpoint" in refused(str(unet)) and "--unet-init" in refused(str(unet))


def test_single_file_without_its_configuration_offline(pipelines, tmp_path):
    path = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    assert "--single-file-config names a diffusers folder" in refused(str(path))


# --- what does not load -------------------------------------------------------------------------------------------------------


def test_no_such_model(tmp_path):
    assert "no such model: " in refused(str(tmp_path / "nowhere" / "at" / "all"))
    assert "no such model: just-a-name" in refused("just-a-name")


def test_unreachable_hub_id():
    message = refused("nobody/no-such-model-on-earth")
    assert "cannot get the model nobody/no-such-model-on-earth from the hub" in message and "local folder" in message


def test_folder_that_is_no_pipeline(tmp_path):
    assert "has no model_index.json" in refused(str(tmp_path))


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


# --- fingerprints ---------------------------------------------------------------------------------------------------------------


def test_fingerprint(pipelines, tmp_path):
    one, same = load(str(pipelines["sd15"])).denoiser, load(str(pipelines["sd15"])).denoiser
    other = load(str(make_pipeline(tmp_path / "other", "sd15", seed=1))).denoiser
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.add_(1e-5)
    assert fingerprint(one) != fingerprint(same)

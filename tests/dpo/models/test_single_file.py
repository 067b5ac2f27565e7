"""dpo.models.single_file: checkpoints in the original layout give what the diffusers folder gives, or one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.models.load import load
from dpo.models.single_file import against, family_by_keys
from dpo.schedule import from_scheduler
from tests.help.ldm import write_single_file
from tests.help.loading import refused


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sd2v", "sdxl"])
def test_single_file_in_the_original_layout(pipelines, tmp_path, kind):
    path = write_single_file(pipelines[kind], tmp_path / "model.safetensors")
    assert all(not name.startswith("unet.") for name in load_file(path))
    one, many = load(str(path), single_file_config=str(pipelines[kind])), load(str(pipelines[kind]))
    assert one.family.name == many.family.name and one.folder is None and len(one.tokenizers) == len(many.tokenizers)
    pairs = zip(
        [one.denoiser, one.vae, *one.text_encoders], [many.denoiser, many.vae, *many.text_encoders], strict=True
    )
    for ours, expected in pairs:
        ours, expected = ours.state_dict(), expected.state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], value) and value.dtype == torch.float32 for name, value in expected.items())
    assert one.scheduler_config["beta_schedule"] == many.scheduler_config["beta_schedule"]
    assert one.prediction_type == many.prediction_type and one.notes == []
    assert one.scheduler_config["_class_name"] == many.scheduler_config["_class_name"]
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


@pytest.mark.long
@pytest.mark.parametrize("layer", ["final_layer_norm", "diffusion_model.out.2", "decoder.conv_out"])
def test_a_single_file_that_lacks_a_layer_names_it(pipelines, tmp_path, layer):
    path = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    kept = {name: value for name, value in load_file(path).items() if layer not in name}
    assert len(kept) < len(load_file(path))
    save_file(kept, path)
    said = refused(str(path), single_file_config=str(pipelines["sd15"]))
    assert f"{path} lacks weights of its parts (" in said and "fetch it again" in said and "meta" not in said


def test_single_file_without_its_configuration_offline(pipelines, tmp_path):
    path = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    assert "--single-file-config names a diffusers folder" in refused(str(path))


def test_a_family_is_known_by_its_keys():
    unet, first, second = "model.diffusion_model.out.2.bias", "conditioner.embedders.0.x", "conditioner.embedders.1.x"
    assert family_by_keys({unet, "cond_stage_model.x"}).name == "sd"
    assert family_by_keys({unet, first, second}).name == "sdxl"
    assert family_by_keys({unet, first}).name == "sd"  # one text encoder: not SDXL's two


EMPTY = torch.zeros(0)
SAYS = {  # keys and metadata -> prediction type, zero terminal SNR, words of the log
    "v": ({"v_pred": EMPTY}, {}, "v_prediction", False, ["v_prediction (key v_pred)"]),
    "v, zero SNR": ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, "v_prediction", True, ["(key v_pred)", "zero terminal SNR"]),
    "spec v": ({}, {"prediction_type": "v"}, "v_prediction", False, ["v_prediction (modelspec)"]),
    "ComfyUI's key": ({}, {"predict_key": "v"}, "v_prediction", False, ["v_prediction (modelspec)"]),
    "spec epsilon": ({}, {"prediction_type": "epsilon"}, "epsilon", False, ["epsilon (modelspec)"]),
    "stale spec": (
        {"v_pred": EMPTY},
        {"prediction_type": "epsilon"},
        "v_prediction",
        False,
        ["against its modelspec: epsilon"],
    ),
    "clip skip": ({}, {"encoder_layer": "2"}, "epsilon", False, ["encoder_layer 2 (clip skip): not followed"]),
    "the family's": ({}, {"architecture": "stable-diffusion-xl-v1-base"}, "epsilon", False, []),
}


def marked(folder, path, keys, spec):
    write_single_file(folder, path)
    metadata = {f"modelspec.{name}": value for name, value in spec.items()}
    save_file(load_file(path) | keys, path, metadata={"format": "pt", **metadata})
    return str(path)


@pytest.mark.long
@pytest.mark.parametrize(("keys", "spec", "kind", "zero", "words"), SAYS.values(), ids=SAYS)
def test_what_a_checkpoint_says_of_itself_is_followed(pipelines, tmp_path, keys, spec, kind, zero, words):
    path = marked(pipelines["sdxl"], tmp_path / "model.safetensors", keys, spec)
    model = load(path, single_file_config=str(pipelines["sdxl"]))
    plan = from_scheduler(model.scheduler_config)
    assert plan.prediction_type == model.prediction_type == kind
    assert (plan.alphas_cumprod[-1] == 0) == zero
    assert model.scheduler_config["timestep_spacing"] == ("trailing" if zero else "leading")
    assert len(model.notes) == len(words) and all(word in line for word, line in zip(words, model.notes, strict=True))


def test_weights_that_say_otherwise_than_the_model(pipelines, tmp_path):
    """Those of --unet-init: the run trains as its model says, and the difference is told."""
    path = marked(pipelines["sdxl"], tmp_path / "unet.safetensors", {"v_pred": EMPTY, "ztsnr": EMPTY}, {})
    model = load(str(pipelines["sdxl"]))
    assert against(Path(path), model) == [
        f"{path} says prediction_type v_prediction, but the run trains prediction_type epsilon",
        f"{path} says rescale_betas_zero_snr True, but the run trains rescale_betas_zero_snr False",
    ]
    plain = marked(pipelines["sdxl"], tmp_path / "plain.safetensors", {}, {"prediction_type": "epsilon"})
    assert against(Path(plain), model) == []


CONTRADICTS = {
    "EDM v": ({"edm_vpred.sigma_max": torch.ones(1)}, {}, "edm_vpred.sigma_max"),
    "EDM": ({"edm_mean": torch.ones(1)}, {}, "trained as EDM"),
    "target": ({}, {"prediction_type": "sample"}, "modelspec.prediction_type sample"),
    "architecture": ({}, {"architecture": "stable-diffusion-v1"}, "no model of the family sdxl"),
    "LoRA": ({}, {"architecture": "stable-diffusion-xl-v1-base/lora"}, "no model of the family sdxl"),
}


@pytest.mark.parametrize(("keys", "spec", "words"), CONTRADICTS.values(), ids=CONTRADICTS)
def test_what_a_checkpoint_says_and_this_trainer_does_not_know(pipelines, tmp_path, keys, spec, words):
    path = marked(pipelines["sdxl"], tmp_path / "model.safetensors", keys, spec)
    assert words in refused(path, single_file_config=str(pipelines["sdxl"]))


def test_checkpoints_with_other_inputs_or_of_another_family(pipelines, tmp_path):
    path = write_single_file(pipelines["sd15"], tmp_path / "model.safetensors")
    assert "is of family sd, not sdxl" in refused(str(path), family="sdxl")
    weights, name = load_file(path), "model.diffusion_model.input_blocks.0.0.weight"
    save_file(weights | {name: weights[name].repeat(1, 3, 1, 1)[:, :9].contiguous()}, path)
    assert "takes 9 channels and not 4; it is an inpainting model" in refused(str(path))
    save_file(weights | {"conditioner.embedders.0.model.x": torch.zeros(1)}, path)
    assert "SDXL refiner" in refused(str(path))


OTHERS = {
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "FLUX": "double_blocks.0.img_attn.qkv.weight",
    "FLUX, as ComfyUI keeps it": "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
    "Lumina": "model.diffusion_model.cap_embedder.0.weight",
    "Stable Cascade": "model.diffusion_model.clip_txt_mapper.weight",
}


@pytest.mark.parametrize(("family", "key"), OTHERS.items(), ids=OTHERS)
def test_a_file_of_another_family_is_named_as_what_it_is(tmp_path, family, key):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(1)}, path)
    message = refused(str(path))
    assert f"is a {family.split(',')[0]} model" in message and "not read from one file" in message
    assert "StableDiffusionPipeline, StableDiffusionXLPipeline" in message and "again" not in message


@pytest.mark.parametrize("key", ["lora_unet_mid_block.lora_down.weight", "unet.mid_block.to_q.lora_A.weight"])
def test_a_lora_is_no_model(tmp_path, key):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({key: torch.zeros(1)}, path)
    assert "is a LoRA, not a whole model: give it as --lora-init" in refused(str(path))
    assert "is a LoRA, not a whole model: give it as --lora-init" in refused(str(tmp_path))

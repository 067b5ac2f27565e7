"""dpo.models.single_file: checkpoints in the original layout give what the diffusers folder gives, or one line."""

import pytest
import torch
from safetensors.torch import load_file

from dpo.models.load import load
from dpo.models.single_file import family_by_keys
from tests.help.ldm import write_single_file
from tests.help.loading import refused


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


def test_a_family_is_known_by_its_keys():
    unet, first, second = "model.diffusion_model.out.2.bias", "conditioner.embedders.0.x", "conditioner.embedders.1.x"
    assert family_by_keys({unet, "cond_stage_model.x"}).name == "sd"
    assert family_by_keys({unet, first, second}).name == "sdxl"
    assert family_by_keys({unet, first}).name == "sd"  # one text encoder: not SDXL's two

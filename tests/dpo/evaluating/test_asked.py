"""dpo.evaluating.asked: what must fail is found before anything is drawn."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpo.common.errors import UserError
from dpo.evaluating.asked import Asked, alike, checked, measured_otherwise
from dpo.evaluating.flags import Method, Named
from dpo.pages.folder import ADAPTER_FILE
from dpo.sampling import work as sampling
from dpo.settings.config import Config, change, to_toml


def asked(base, *others, **more):
    """What is asked for of sides by place."""
    methods = tuple(Method(place, (Named(place, str(place)),)) for place in others)
    draw = sampling.Asked(model="", **more.pop("draw", {}))
    return Asked(Named("base", str(base)), methods, draw, ("tiny-b",), **more)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "prompts.csv").write_text("file,prompt\na.png,a fox\n", "utf-8")
    return tmp_path / "pictures"


def test_what_is_compared_comes_in_its_order():
    found = asked("a", "b", "c")
    assert [named.place for named in found.models] == ["a", "b", "c"]


def test_models_and_folders_of_images_pass(world, pictures):
    assert checked(asked(world("sd15"), pictures, draw={"steps": 3})) is None
    assert checked(asked(pictures, pictures)) is None


@pytest.mark.parametrize("side", ["nowhere", "start:nowhere"])
def test_a_side_that_is_not_there_is_refused(world, side):
    with pytest.raises(UserError):
        checked(asked(world("sd15"), side))


def test_the_model_under_a_lora_is_no_lora(world, tmp_path, pictures):
    """A base by its name is not taken for the LoRA whose base it is."""
    with pytest.raises(UserError, match="there is no folder owner/name here"):
        checked(asked("owner/name", world("sd15"), draw={"lora_base": "owner/name"}))


def test_images_are_looked_at_before_others_are_drawn(world, pictures):
    (pictures / "prompts.csv").unlink()
    with pytest.raises(UserError, match="does not say what its images were drawn from"):
        checked(asked(world("sd15"), pictures))


def test_the_pairs_are_looked_at(world, pictures):
    config = checked(asked(world("sd15"), world("sd15"), pairs=world("pairs")))
    assert config.data.data == world("pairs") and config.model.model == world("sd15")
    assert "validation" in str(checked(asked("embedded", "embedded", pairs="embedded")).data.data)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        checked(asked(world("sd15"), world("sd15"), pairs="nowhere"))
    with pytest.raises(UserError, match="--pairs needs models, and base is a folder of images"):
        checked(asked(pictures, world("sd15"), pairs=world("pairs")))


def test_several_guidances_want_a_base_that_is_drawn(pictures):
    """Else "the base at its best guidance" would be made of images of one."""
    with pytest.raises(
        UserError, match="^--guidance 5,7.5 draws the base with each, and base is a folder of images: name"
    ):
        checked(asked(pictures, "embedded", guidance=(5.0, 7.5), draw={"guidance": 5.0}))
    assert checked(asked(pictures, "embedded", guidance=(5.0,), draw={"guidance": 5.0})) is None
    assert checked(asked("embedded", pictures, guidance=(5.0, 7.5), draw={"guidance": 5.0})) is None


def test_half_and_a_published_table_do_not_go_together(pictures):
    """Scores in bf16 have another name, which the table has not: it would be missing in the end."""
    with pytest.raises(UserError, match="^--half gives the scores other names, and --reproduce lpo has numbers by"):
        checked(asked(pictures, pictures, half=True, reproduce="lpo"))


@pytest.mark.parametrize(
    ("text", "words"), [(None, "scores.csv"), ("file,score\na.png,much\n", "'much' is not a number")]
)
def test_tables_are_read_before_anything_is_drawn(pictures, tmp_path, text, words):
    if text is not None:
        (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        checked(asked("embedded", pictures, tables=(("theirs", tmp_path / "scores.csv"),)))


def test_all_models_are_asked_as_the_run_among_them_was_trained(world, tmp_path):
    folder = shutil.copytree(world("flux-dev"), tmp_path / "run")
    values = {"model": "m", "text_tokens": 16, "timesteps": "turbo", "train_guidance": 2.0}
    (folder / "config.toml").write_text(to_toml(change(Config(), **values)))
    given = alike(asked(world("flux-dev"), folder, pairs=world("pairs")))
    assert given.draw.text_tokens == 16
    config = checked(given)
    assert (config.model.text_tokens, config.model.timesteps, config.model.train_guidance) == (16, "turbo", 2.0)
    assert alike(asked(world("flux-dev"), folder, draw={"text_tokens": 8})).draw.text_tokens == 8
    assert given.draw.few_steps == {"m"}, "which is drawn in them too"


def test_what_is_measured_otherwise_than_it_was_trained_is_said(world, tmp_path):
    places = []
    for name, values in {"few": {"timesteps": "turbo"}, "all": {"timesteps": "all"}}.items():
        places.append(shutil.copytree(world("sd35"), tmp_path / name))
        (places[-1] / "config.toml").write_text(to_toml(change(Config(), model="m", text_tokens=16, **values)))
    both = alike(asked(world("sd35"), *places, pairs=world("pairs")))
    lines = measured_otherwise(both, checked(both))
    assert len(lines) == 2 and "few was trained with --timesteps turbo, and its accuracy" in lines[0]
    assert "is measured with what the base's own files say, as all are" in lines[1]
    alone = alike(asked(world("sd35"), places[0], pairs=world("pairs")))
    assert measured_otherwise(alone, checked(alone)) == []


def test_a_lora_may_be_the_base_of_an_accuracy(world, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, folder / ADAPTER_FILE)
    (folder / "config.toml").write_text(to_toml(change(Config(), model=world("sd35"), text_tokens=16, lora=True)))
    config = checked(asked(folder, folder, pairs=world("pairs")))
    assert (config.model.model, config.model.text_tokens) == (world("sd35"), 16)

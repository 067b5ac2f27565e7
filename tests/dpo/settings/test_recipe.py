"""What of a preset, of a script's defaults or of a user's own file holds beside the user's flags."""

import pytest

from dpo.common.errors import UserError
from dpo.methods import PREFERENCE, own_settings
from dpo.settings.config import flatten, specs
from dpo.settings.flags import load_preset, parse, presets
from dpo.settings.recipe import beside

HUB = "liuhuohuo2/pick-a-pic-v2"
REAL = sorted(name for name in presets() if {"model", "data"} <= load_preset(name).keys())
OWN = ("flux2-klein-4b",)  # from a store of one's own pairs, which names none of strangers to hold out
CHOICE = ("validation_data", "validation_split", "validation_fraction")


def held_out(*argv):
    """(what is held out, the notes that say something of it)."""
    cfg, notes = parse(list(argv))
    values = flatten(cfg)
    return tuple(values[name] for name in CHOICE), [note for note in notes if "held" in note]


@pytest.mark.parametrize("name", [name for name in REAL if name not in OWN])
def test_ones_own_pairs_drop_the_held_out_pairs_of_a_preset(name):
    assert held_out("--preset", name) == ((HUB, "validation_unique", None), [])
    found, notes = held_out("--preset", name, "--data", "my.csv")
    assert found == (None, "validation", None), "none of strangers, and the share is left open"
    assert len(notes) == 1 and HUB in notes[0] and f"preset {name}" in notes[0] and "left out" in notes[0]


@pytest.mark.parametrize("name", OWN)
def test_a_preset_for_ones_own_store_holds_out_as_without_a_preset(name):
    assert (
        held_out("--preset", name) == held_out("--preset", name, "--data", "my.csv") == ((None, "validation", None), [])
    )


def test_a_share_or_a_set_of_ones_own_is_said_once_and_not_refused():
    found, notes = held_out("--preset", "sd15", "--validation-fraction", "0.1")
    assert found == (None, "validation", 0.1) and len(notes) == 1 and "--validation-fraction is given" in notes[0]
    found, notes = held_out("--preset", "sd15", "--data", "my.csv", "--validation-fraction", "0.1")
    assert found == (None, "validation", 0.1) and len(notes) == 1
    found, notes = held_out("--preset", "sd15", "--data", "my.csv", "--validation-data", "held.csv")
    assert found == ("held.csv", "validation", None) and notes == [], "the preset's split is of the preset's set"
    found, notes = held_out("--preset", "sd15", "--data", "my.csv", "--validation-data", HUB)
    assert found == (HUB, "validation_unique", None) and notes == []


def test_no_share_leaves_a_presets_own_pairs_alone():
    assert held_out("--preset", "sd15", "--validation-fraction", "0")[0] == (HUB, "validation_unique", 0.0)
    found, notes = held_out("--preset", "sd15", "--data", "my.csv", "--validation-fraction", "0")
    assert found == (None, "validation", 0.0) and "instead" not in notes[0]
    assert held_out("--preset", "sd15", "--data", HUB)[0] == (HUB, "validation_unique", None)


def test_a_file_of_the_users_keeps_its_word(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "m"\ndata = "d"\nvalidation_data = "v"\nvalidation_split = "x"\nbeta = 7.0')
    assert held_out("--config", str(file)) == (("v", "x", None), [])
    found, notes = held_out("--config", str(file), "--data", "other")
    assert found == ("v", "x", None) and len(notes) == 1 and "(v)" in notes[0] and "--validation-fraction" in notes[0]
    assert held_out("--config", str(file), "--validation-fraction", "0.1")[0] == (None, "x", 0.1)
    assert parse(["--config", str(file), "--method", "dde"])[0].method.beta == 7.0
    file.write_text('model = "m"\ndata = "d"\nvalidation_fraction = 0.2')
    assert held_out("--config", str(file), "--validation-data", "v")[0] == ("v", "validation", None)


def test_the_length_of_a_run_in_the_users_way_replaces_the_other_way():
    """Steps of a preset do not hold beside a user's epochs, and its epochs not beside his steps; both from him are refused."""

    def length(*argv):
        cfg, notes = parse(list(argv))
        return cfg.optim.steps, cfg.optim.epochs, notes

    own = ["--preset", "sd15-lora-8gb", "--data", "my.csv"]
    assert length("--preset", "sd15-lora", "--epochs", "0.5") == (None, 0.5, [])
    assert length(*own) == (None, 10.0, []) and length(*own, "--steps", "40") == (40, None, [])
    assert length(*own, "--steps", "none") == (None, 10.0, []) and length("--epochs", "2") == (None, 2.0, [])
    with pytest.raises(UserError, match="^steps = 5 and epochs = 3 both say how long a run is: give one$"):
        length(*own, "--steps", "5", "--epochs", "3")
    peer = ["--compat", "sf", "--model", "m", "--data", "d", "--max_train_steps", "7", "--num_train_epochs", "3"]
    steps, epochs, notes = length(*peer)
    assert (steps, epochs) == (7, None) and "--epochs has no effect because --steps is given" in notes


def test_beta_belongs_to_the_method_of_the_recipe():
    assert parse(["--preset", "sd15-lora"])[0].method.beta == 5000.0
    assert parse(["--preset", "sd15-lora", "--method", "dpo"])[0].method.beta == 5000.0
    cfg, notes = parse(["--preset", "sd15-lora", "--method", "dde"])
    assert cfg.method.beta is None
    assert notes == ["preset sd15-lora: beta 5000 belongs to dpo; dde takes its own default"]
    cfg, notes = parse(["--preset", "sd15-lora", "--method", "dde", "--beta", "300"])
    assert cfg.method.beta == 300.0 and notes == []
    assert parse(["--preset", "sd15-lora", "--method", "sft"])[1] == [], "sft reads no beta"
    cfg, notes = parse(["--model", "m", "--data", "d", "--compat", "sf", "--method", "dde"])
    assert cfg.method.beta is None and any("beta 5000 belongs to dpo" in note for note in notes)


@pytest.mark.parametrize("name", sorted(own_settings()))
def test_every_setting_of_a_method_goes_with_it(name):
    value = specs()[name].default or 1.0
    notes = []
    assert beside({"method": "dde", name: value}, {"method": "dpo"}, "preset x", notes) == {"method": "dde"}
    assert beside({"method": "dde", name: value}, {"method": "dde"}, "preset x", []) == {"method": "dde", name: value}
    assert bool(notes) == (name in PREFERENCE)

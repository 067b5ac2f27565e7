"""dpo.pages.origin: what of a run's start others may read."""

import pytest

from dpo.pages.origin import LICENCES, licence, public
from dpo.planning.sketch import SHIPPED
from tests.help.fake_run import run_of


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/model", "owner/model"),
        ("/home/me/models/sd15/", "sd15"),
        (r"C:\Users\me\juggernaut.safetensors", "juggernaut.safetensors"),
        ("./pairs", "pairs"),
        ("/home/me/runs/sft/unet", "sft/unet"),
        ("/", None),
        (None, None),
    ],
)
def test_of_a_path_its_last_part_is_shown(name, shown):
    assert public(name) == shown


def test_a_folder_that_looks_like_a_hub_id_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert public("me/model") == "me/model"
    monkeypatch.chdir(tmp_path)
    assert public("me/model") == "model"


def test_the_licence_comes_from_the_base():
    run = run_of("lora-gpu")
    assert licence(run).license == "openrail++" and licence(run_of("good")).license == "apache-2.0"
    assert set(SHIPPED) <= set(LICENCES), "the models that the presets name"
    unknown = {**run.settings, "model": {**run.settings["model"], "model": "owner/model"}}
    assert licence(run._replace(settings=unknown)) is None

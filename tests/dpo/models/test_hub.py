"""dpo.models.hub: a name becomes a place on disk, or one line that says what to do."""

import pytest

from dpo.common.errors import UserError
from dpo.models.hub import check_part, locate
from tests.help.loading import refused


def test_what_is_on_disk_stays_where_it_is(pipelines, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert locate(str(pipelines["sd15"])) == pipelines["sd15"]
    assert locate(str(tmp_path / "model.safetensors")) == tmp_path / "model.safetensors"


def test_the_home_folder_is_found(pipelines, monkeypatch):
    monkeypatch.setenv("HOME", str(pipelines["sd15"].parent))
    assert locate(f"~/{pipelines['sd15'].name}") == pipelines["sd15"]


def test_no_such_model(tmp_path):
    assert "no such model: " in refused(str(tmp_path / "nowhere" / "at" / "all"))
    assert "no such model: just-a-name" in refused("just-a-name")


def test_unreachable_hub_id():
    message = refused("nobody/no-such-model-on-earth")
    assert message.startswith("there is no folder nobody/no-such-model-on-earth here, and cannot")
    assert "cannot get the model nobody/no-such-model-on-earth from the hub" in message and "local folder" in message


def test_folder_that_is_no_pipeline(tmp_path):
    assert "has no model_index.json" in refused(str(tmp_path))


@pytest.mark.parametrize("source", [None, "owner/name"])
def test_parts_that_may_be_there(source, tmp_path):
    check_part("--vae", source)
    check_part("--vae", str(tmp_path))


def test_a_part_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--unet-init .*/nowhere: no such folder or file, and not a hub id"):
        check_part("--unet-init", str(tmp_path / "nowhere"))

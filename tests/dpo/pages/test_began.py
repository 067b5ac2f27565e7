"""dpo.pages.began: the checksums of a run's beginning; what is missing or odd is not known."""

import json

import pytest

from dpo.pages.began import read_made_from, start_of
from dpo.settings.config import Config, change, to_toml


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (json.dumps({"made_from": {"vae": "1f"}}), {"vae": "1f"}),
        (json.dumps({"made_from": "1f"}), {}),
        (json.dumps({"status": "finished"}), {}),
        ("[1", {}),
        (None, {}),
    ],
)
def test_what_is_not_known_is_empty(tmp_path, content, found):
    if content is not None:
        (tmp_path / "summary.json").write_text(content, "utf-8")
    assert read_made_from(tmp_path) == found


def run(folder, made_from, **settings):
    config = change(Config(), data="pairs", output=str(folder), **settings)
    (folder / "config.toml").write_text(to_toml(config), "utf-8")
    (folder / "summary.json").write_text(json.dumps({"made_from": made_from}), "utf-8")
    return folder


BOTH = {"model": "1f", "start": "2f"}


@pytest.mark.parametrize(
    ("settings", "lora", "said", "checksum"),
    [
        ({"model": "a/b"}, False, "a/b", "1f"),
        ({"model": "/x/tiny/assets/pipeline"}, False, "embedded", "1f"),
        ({"model": "a/b", "unet_init": "u"}, False, "a/b with --unet-init u", "2f"),
        ({"model": "a/b", "unet_init": "u"}, True, "a/b with --unet-init u", "2f"),
        ({"model": "a/b", "lora_init": "l"}, False, "a/b with --lora-init l", "2f"),
        ({"model": "a/b", "lora_init": "l"}, True, "a/b", "1f"),
        ({"model": "a/b", "unet_init": "u", "lora_init": "l"}, True, "a/b with --unet-init u", None),
    ],
)
def test_what_a_result_is_a_change_of(tmp_path, settings, lora, said, checksum):
    found = start_of(run(tmp_path, BOTH, **settings), lora=lora)
    assert (found.said, found.checksum) == (said, checksum)
    assert found.is_model("a/b", "3f") is (None if checksum is None else False)


def test_where_no_checksum_is_known_the_place_tells(tmp_path):
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir(), other.mkdir()
    assert start_of(tmp_path) is None
    local = start_of(run(tmp_path, {}, model=str(here)))
    assert [local.is_model(str(name), "1f") for name in (f"{here}/.", other, "a/b", "embedded")] == [
        True,
        False,
        None,
        False,
    ]
    of_hub = start_of(run(tmp_path, {}, model="a/b"))
    assert [of_hub.is_model(name, "1f") for name in ("a/b", "a/c", str(here))] == [True, False, None]
    assert start_of(run(tmp_path, {}, model="/x/tiny/assets/pipeline")).is_model("embedded", "1f")
    assert start_of(run(tmp_path, {}, model="a/b", unet_init="u")).is_model("a/b", "1f") is None

"""dpo.pages.began: the checksums of a run's beginning; what is missing or odd is not known."""

import json

import pytest

from dpo.pages.began import read_made_from


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

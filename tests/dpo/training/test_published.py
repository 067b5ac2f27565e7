"""dpo.training.published: what others read of a run does not say where its user keeps files."""

import html
import json
from pathlib import Path

import pytest

from dpo.pages.folder import own_files
from dpo.settings.config import Config, change, to_toml
from dpo.training.published import TEXTS, published


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home" / "ann")
    place = tmp_path / "home" / "ann" / "my runs" / "é & fox"
    data = tmp_path / "disk" / "secret project" / "pairs"
    data.mkdir(parents=True)
    place.mkdir(parents=True)
    config = change(Config(), model="owner/name", data=str(data), output=str(place), vae=str(data.parent / "vae"))
    (place / "config.toml").write_text(to_toml(config))
    error = f"{data}/a.png and {place}/x: no such file, looked in {tmp_path}/home/ann/.cache"
    (place / "metrics.jsonl").write_text(json.dumps({"event": "failed", "message": error}) + "\n")
    (place / "summary.json").write_text(json.dumps({"model": {"source": "owner/name"}, "data": str(data)}))
    (place / "report.html").write_text(f"<p>{html.escape(str(data))} {html.escape(str(place))}</p>")
    (place / "README.md").write_text(f"pipe.load({str(place)!r})")
    (place / "curves.png").write_bytes(b"png")
    return place


def test_no_text_names_a_place_and_all_else_is_as_it_is(folder, tmp_path):
    before = {name: (folder / name).read_bytes() for name in own_files(folder)}
    for name in own_files(folder):
        found = published(folder, name)
        if name not in TEXTS:
            assert found == folder / name
            continue
        assert isinstance(found, bytes)
        text = found.decode()
        for word in ("secret project", "disk", "home/ann", "my runs", str(tmp_path)):
            assert word not in text, (name, word)
    config = published(folder, "config.toml").decode()
    assert 'data = "pairs"' in config and 'model = "owner/name"' in config and 'vae = "vae"' in config
    assert json.loads(published(folder, "metrics.jsonl"))["message"].startswith("pairs/a.png and é & fox/x:")
    assert {name: (folder / name).read_bytes() for name in before} == before, "the user's own copy is not touched"

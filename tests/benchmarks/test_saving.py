"""The benchmark of memory on saving sees what a work takes and nothing from before it, and writes its table."""

import json
import os
from contextlib import nullcontext

import pytest

from benchmarks import losses, saving

pytestmark = pytest.mark.skipif(not os.access(saving.RESET, os.W_OK), reason="Linux alone lets the peak begin again")


def taken(mib: int) -> None:
    bytearray(b"x") * (mib * 2**20)


def test_a_work_is_charged_with_its_own_peak_alone():
    kept = []
    taken(256)  # a peak before it, free again
    found = saving.measured(lambda: (taken(64), taken(96), kept.append(bytearray(b"x") * (16 * 2**20))))
    assert 95 < found["MiB more"] < 110, found
    again = saving.measured(lambda: taken(48))
    assert 47 < again["MiB more"] < 62 and 14 < again["MiB held"] - found["MiB held"] < 30, again


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """No pipelines, and a folder for each commit, of which the new one alone can export."""
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr(saving, "ready", lambda root, sizes: None)
    monkeypatch.setattr(losses, "checkout", lambda commit: nullcontext(tmp_path / commit))
    (tmp_path / "new/dpo").mkdir(parents=True)
    (tmp_path / "new/dpo/export.py").touch()


def test_commits_take_turns_and_their_medians_are_told(tmp_path, monkeypatch, capsys, quiet):
    asked = []

    def child(tree, name, root, size):
        asked.append((tree.name, name))
        return {"MiB held": 500.0, "MiB more": {1: 9.0, 2: 70.0}.get(len(asked), 5.0), "MiB written": 2.0}

    monkeypatch.setattr(saving, "child", child)
    words = ["old", "new", "--work", "result, LoRA", "export, ComfyUI", "--out", str(tmp_path / "out")]
    assert saving.main(words) == 0
    assert asked == [("old", "result, LoRA"), ("new", "result, LoRA")] * 3 + [("new", "export, ComfyUI")] * 3
    old, new, none, one = json.loads((tmp_path / "out/results.json").read_text())["saving"]
    assert (old["MiB more"], old["least"], old["most"]) == (5, 5, 9)
    assert (new["MiB more"], new["most"], new["times"]) == (5, 70, 3)
    assert none == {"work": "export, ComfyUI", "commit": "old"} and one["MiB written"] == 2
    assert "| export, ComfyUI | old | - |" in capsys.readouterr().out and (tmp_path / "out/saving.md").is_file()


@pytest.mark.slow
def test_every_work_is_measured(tmp_path):
    """With the tiny pipeline, in the working tree."""
    assert saving.main(["--size", "tiny", "--times", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["saving"]
    assert [row["work"] for row in rows] == saving.WORKS
    assert all(0 <= row["MiB more"] < 100 < row["MiB held"] for row in rows)
    assert all(row["MiB written"] > 0 for row in rows if row["work"] != "sample images")  # a few kilobytes here
    whole, _, adapter, *_ = rows
    assert whole["MiB written"] > 2 * adapter["MiB written"]

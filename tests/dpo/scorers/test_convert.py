"""A published pickle becomes safetensors once, tensors alone, and no code of it runs."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.scorers.convert import convert


@pytest.mark.parametrize("nested", [None, "state_dict"])
def test_the_tensors_are_equal_and_the_source_is_named(tmp_path, nested):
    weight = torch.randn(6, 4)
    state = {"a.weight": weight, "a.tied": weight, "b": weight[:, 1:3], "step": 7}
    torch.save({nested: state, "epoch": 3} if nested else state, source := tmp_path / "published.pt")
    target = convert(source)
    found = load_file(target)
    assert target.name == "published.safetensors" and found.keys() == {"a.weight", "a.tied", "b"}
    assert all(torch.equal(found[name], state[name]) for name in found)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"source": "published.pt", "source_sha256": checksum(source)}


def test_what_cannot_be_written_is_one_line(tmp_path):
    torch.save({"a": torch.eye(2)}, tmp_path / "x.pt")
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*x.safetensors \(.*\); move x.pt to a folder"):
        convert(tmp_path / "x.pt")


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    torch.save({"a": torch.eye(2)}, source := tmp_path / "x.pt")
    made = convert(source)
    before = made.read_bytes(), made.stat().st_mtime_ns
    assert convert(source) == made and (made.read_bytes(), made.stat().st_mtime_ns) == before, "it is there already"
    torch.save({"a": torch.zeros(2)}, source)
    for content in (before[0], b"of somebody else"):
        made.write_bytes(content)
        with pytest.raises(UserError, match=r"x.safetensors is there already, and not converted from this x.pt: move"):
            convert(source)
        assert made.read_bytes() == content


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(UserError, match="cannot be read as a file of weights"):
            convert(Path(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt", "evil2.pt"]


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1, 2])])
def test_what_holds_no_weights_is_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt") as caught:
        convert(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "x.safetensors").exists()
    with pytest.raises(UserError):
        convert(tmp_path / "none.pt")


def test_nothing_else_unpickles():
    root = Path(__file__).parents[3]
    found = [
        path.relative_to(root).as_posix()
        for room in ("dpo", "csrc_triton", "benchmarks")
        for path in (root / room).rglob("*.py")
        if "torch.load(" in (text := path.read_text("utf-8")) or "pickle.load" in text or "weights_only=False" in text
    ]
    assert found == ["dpo/scorers/convert.py"]

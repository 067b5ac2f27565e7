"""dpo.exporting.pieces: a file written tensor by tensor is the file that safetensors reads."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.exporting.pieces import HASH, of_file, of_files, of_tensors, write

TENSORS = {
    "b.weight": torch.linspace(-1, 1, 15).view(3, 5).T,  # not contiguous
    "a.bias": torch.tensor([1.5]),
    "half": torch.arange(3).half(),
    "count": torch.arange(4)[None],
    "scalar": torch.tensor(2.0),
    "mark": torch.zeros(0),
}


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    write(tmp_path / "a.safetensors", of_tensors(TENSORS), {"title": "a ü"}, fp16=False)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in TENSORS.items())
    said = header(tmp_path / "a.safetensors")
    assert said["title"] == "a ü" and said["format"] == "pt"
    content = (tmp_path / "a.safetensors").read_bytes()
    at = 8 + int.from_bytes(content[:8], "little")
    assert at % 8 == 0 and said[HASH] == "0x" + hashlib.sha256(content[at:]).hexdigest()


def test_tensors_of_a_file_are_read_one_by_one(tmp_path):
    save_file({"x": torch.ones(2, 3), "y": torch.zeros(1).bfloat16()}, tmp_path / "x.safetensors")
    found = of_file(tmp_path / "x.safetensors")
    assert found["x"].shape == (2, 3) and found["y"].dtype == torch.bfloat16
    write(tmp_path / "y.safetensors", found, {}, fp16=True)
    half = load_file(tmp_path / "y.safetensors")
    assert torch.equal(half["x"], torch.ones(2, 3).half()) and half["y"].dtype == torch.float16
    (tmp_path / "z.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        of_file(tmp_path / "z.safetensors")


def test_a_tensor_in_two_files_is_refused_by_their_names(tmp_path):
    """A whole file and the shards of another save lie in one folder: which is the model?"""
    names = (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "b.safetensors",
    )
    paths = [tmp_path / name for name in names]
    for path, name in zip(paths, ("a", "a", "b"), strict=True):
        save_file({name: torch.zeros(2)}, path)
    assert of_files([paths[0], paths[2]]).keys() == {"a", "b"}
    with pytest.raises(UserError, match=rf"{names[1]} and {names[0]} both hold a: keep one"):
        of_files(paths)


@pytest.mark.parametrize(
    ("value", "fp16", "words"),
    [
        (7e4, True, r"w does not fit into fp16: it has 7e\+04, and fp16 ends at 65504; leave --fp16 out"),
        (float("nan"), False, "w has NaN or infinity"),
        (float("inf"), True, "w has NaN or infinity"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, value, fp16, words):
    with pytest.raises(UserError, match=words):
        write(tmp_path / "a.safetensors", of_tensors({"w": torch.tensor([1.0, value])}), {}, fp16=fp16)
    assert list(tmp_path.iterdir()) == []

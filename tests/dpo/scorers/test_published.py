"""Converted weights: where they are looked for, and one line for each way in which they are not there."""

import pytest
import torch
from safetensors.torch import save_file

from dpo.common.errors import UserError
from dpo.scorers.published import converted, fill, read


def test_a_file_is_found_by_name_and_alone_in_its_folder(tmp_path):
    save_file({"weight": torch.eye(2)}, tmp_path / "a.safetensors")
    assert converted("x", "SOURCE", str(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"
    assert converted("x", "SOURCE", str(tmp_path)) == tmp_path / "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"^x: .* holds 2 .safetensors files, not one; name the file, x:FILE$"):
        converted("x", "SOURCE", str(tmp_path))


def test_a_pickle_is_not_read(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    remedy = r"convert SOURCE once \(python -m dpo.evaluate --convert FILE\) and name what that writes, x:FILE$"
    with pytest.raises(UserError, match=rf"^x: .*x.pt is no .safetensors file; {remedy}"):
        converted("x", "SOURCE", str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match=rf"^x: its weights are published as a pickle, .*; {remedy}"):
        converted("x", "SOURCE", None)
    with pytest.raises(UserError, match=r"is no .safetensors file"):
        converted("x", "SOURCE", str(tmp_path / "missing.safetensors"))


def test_damaged_and_foreign_files_are_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{]")
    with pytest.raises(UserError, match=r"a.safetensors cannot be read \(.*\); convert the published file again$"):
        read(path)
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"holds other weights than this scorer's \(.*bias.*\); convert") as caught:
        fill(module, {"weight": torch.eye(2)}, path)
    assert "\n" not in str(caught.value)
    fill(module, {"weight": torch.eye(2), "bias": torch.ones(2)}, path)
    assert torch.equal(module(torch.zeros(1, 2)), torch.ones(1, 2))

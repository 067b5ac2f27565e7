"""The benchmark of an update runs from end to end, and its peers' update is the peers' loss."""

import json

import pytest
import torch

from benchmarks import step
from dpo.models.family import TextEncoding


@pytest.mark.slow
def test_the_tiny_size(tmp_path, capsys):
    words = ["--size", "tiny", "--family", "sdxl", "--train", "lora", "--updates", "2", "--out", str(tmp_path)]
    assert step.main(words) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["step"]
    assert row["recorded, FLOPs x"] > row["store, FLOPs x"] > row["images, FLOPs x"] == 1
    assert row["kept, FLOPs x"] == row["store, FLOPs x"] and row["images, x"] > 0
    assert "| tiny | sdxl | lora |" in capsys.readouterr().out and (tmp_path / "step.md").is_file()


def test_the_peers_loss_of_equal_models_is_ln_2():
    text = TextEncoding(torch.zeros(3, 2, 2))
    loss = step.peers_loss(
        lambda x, *_: x, lambda x, *_: x, torch.randn(6, 4, 2, 2), text, None, torch.full((10,), 0.5)
    )
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


@pytest.mark.slow
def test_two_processes_at_once(monkeypatch):
    monkeypatch.setattr(step, "TURNS", 2)
    row = step.scaling("tiny", 2)
    assert row["pairs/s of 1"] > 0 and 0.2 < row["share of twice"] < 2

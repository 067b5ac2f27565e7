"""The benchmark of an update runs from end to end, and its peers' update is the peers' loss."""

import json
from types import MappingProxyType, SimpleNamespace

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


def test_the_peers_encode_in_calls_of_eight_images_and_scale():
    calls = []

    class Vae(torch.nn.Conv2d):
        config = MappingProxyType({"scaling_factor": 0.5})

        def encode(self, part):
            calls.append((len(part), part.dtype, torch.is_grad_enabled()))
            return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: self(part)))

    vae, pixels = Vae(3, 4, 1).bfloat16(), torch.randn(10, 3, 2, 2)
    latents, text = step.peers_encoding(vae, pixels, lambda: "text")
    assert calls == [(8, torch.bfloat16, False), (2, torch.bfloat16, False)] and text == "text"
    assert torch.allclose(latents, vae(pixels.bfloat16()).float() * 0.5, atol=1e-2) and latents.dtype == torch.float32


@pytest.mark.slow
def test_two_processes_at_once(monkeypatch):
    monkeypatch.setattr(step, "TURNS", 2)
    row = step.scaling("tiny", 2)
    assert row["pairs/s of 1"] > 0 and 0.2 < row["share of twice"] < 2

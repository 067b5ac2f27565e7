"""dpo.training.results: what is written at the end, with whose weights, and what goes to the hub."""

import logging

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from dpo.models.load import load
from dpo.training import results
from tests.help.allocations import Allocations
from tests.help.running import make_run


def start(world, folder, *flags):
    return make_run(world("sd15"), world("pairs"), folder, "--batch-size", "2", *flags)


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_whole_pipeline(world, tmp_path):
    run = start(world, tmp_path)
    with torch.no_grad():
        run.model.denoiser.conv_in.bias.add_(1)
    results.write(run)
    again, written = load(str(tmp_path)), results.trained(run)
    assert written is not run.model.denoiser and same(written, run.model.denoiser)
    assert same(again.denoiser, written) and same(again.vae, load(world("sd15")).vae)


def test_averaged_weights_are_the_result(world, tmp_path):
    run = start(world, tmp_path, "--ema", "0.9")
    for average in run.updater.ema:
        average.add_(1)
    results.write(run)
    written = results.trained(run)
    assert torch.equal(written.conv_in.bias, run.model.denoiser.conv_in.bias + 1)
    assert same(load(str(tmp_path)).denoiser, written)


def test_frozen_parts_are_written_as_they_were_loaded(world, tmp_path):
    """The run's own VAE and text encoder are rounded to bf16; an override of what is predicted stays."""
    run = start(world, tmp_path, "--precision", "bf16", "--prediction-type", "v_prediction")
    assert run.model.vae.dtype == torch.bfloat16
    results.write(run)
    again, source = load(str(tmp_path)), load(world("sd15"))
    assert same(again.vae, source.vae) and same(again.text_encoders[0], source.text_encoders[0])
    assert again.prediction_type == "v_prediction" and source.prediction_type == "epsilon"


def test_an_adapter_is_written_alone(world, tmp_path):
    results.write(start(world, tmp_path, "--lora", "--rank", "2"))
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("flags", [[], ["--ema", "0.9"], ["--lora-format", "kohya"]], ids=" ".join)
def test_saving_an_adapter_touches_nothing_else(world, tmp_path, flags):
    """No tensor of the UNet is copied, cast or moved; the averaged adapter changes places with that in training."""
    run = start(world, tmp_path, "--lora", "--rank", "2", *flags)
    for average in run.updater.ema:
        average.fill_(0.25)
    before = [p.data_ptr() for p in run.model.denoiser.parameters()]
    with Allocations() as made:
        results.write(run)
    assert made.elements <= sum(p.numel() for p in run.updater.parameters)
    assert [p.data_ptr() for p in run.model.denoiser.parameters()] == before
    written = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    if run.updater.ema:
        assert all((value == 0.25).all() for value in written.values())


@pytest.mark.parametrize("reachable", [True, False])
def test_upload(world, tmp_path, monkeypatch, caplog, reachable):
    asked = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            if not reachable:
                raise OSError("no network\nmore lines")
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **named):
            asked.update(named)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    run = start(world, tmp_path / "mine")
    with caplog.at_level(logging.INFO, "dpo"):
        results.upload(run)
    if reachable:
        assert asked["repo_id"] == "me/mine" and asked["folder_path"] == run.output
        assert "checkpoints/**" in asked["ignore_patterns"] and "https://huggingface.co/me/mine" in caplog.text
    else:
        assert not asked and "not uploaded to the hub (no network); later: hf upload mine" in caplog.text

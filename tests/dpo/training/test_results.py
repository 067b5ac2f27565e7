"""dpo.training.results: what is written at the end, with whose weights, and what goes to the hub."""

import inspect
import logging
import types

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from dpo.models.load import load
from dpo.training import published, results
from tests.help.allocations import Allocations
from tests.help.running import make_run


def start(world, folder, *flags):
    return make_run(world("sd15"), world("pairs"), folder, "--batch-size", "2", *flags)


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.long
def test_the_whole_pipeline(world, tmp_path):
    run = start(world, tmp_path)
    with torch.no_grad():
        run.model.denoiser.conv_in.bias.add_(1)
    results.write(run)
    again, written = load(str(tmp_path)), results.trained(run)
    assert written is not run.model.denoiser and same(written, run.model.denoiser)
    assert same(again.denoiser, written) and same(again.vae, load(world("sd15")).vae)


@pytest.mark.long
def test_averaged_weights_are_the_result(world, tmp_path):
    run = start(world, tmp_path, "--ema", "0.9")
    for average in run.updater.ema:
        average.add_(1)
    results.write(run)
    written = results.trained(run)
    assert torch.equal(written.conv_in.bias, run.model.denoiser.conv_in.bias + 1)
    assert same(load(str(tmp_path)).denoiser, written)


@pytest.mark.long
@pytest.mark.parametrize("vae", ["bf16", "fp32"])
def test_frozen_parts_are_written_as_they_were_loaded(world, tmp_path, vae):
    """The run's own VAE and text encoder, or that alone, are rounded to bf16; an override of what is predicted stays."""
    flags = ["--precision", "bf16", "--vae-precision", vae, "--prediction-type", "v_prediction"]
    run = start(world, tmp_path, *flags)
    assert run.model.vae.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[vae]
    assert run.model.text_encoders[0].dtype == torch.bfloat16
    results.write(run)
    again, source = load(str(tmp_path)), load(world("sd15"))
    assert same(again.vae, source.vae) and same(again.text_encoders[0], source.text_encoders[0])
    assert again.prediction_type == "v_prediction" and source.prediction_type == "epsilon"


def test_an_adapter_is_written_alone(world, tmp_path):
    results.write(start(world, tmp_path, "--lora", "--rank", "2"))
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.long
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


class Hub:
    """Stands for the hub: what was asked of it, and a repository that is there already where `public` says so."""

    def __init__(self, public=None, reachable=True):
        self.public, self.reachable, self.asked, self.uploaded = public, reachable, {}, {}

    def create_repo(self, name, *, private, exist_ok):
        if not self.reachable:
            raise OSError("no network\nmore lines")
        self.asked = {"name": name, "private": private, "exist_ok": exist_ok}
        self.public = not private if self.public is None else self.public
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def model_info(self, name):
        return types.SimpleNamespace(private=not self.public)

    def create_commit(self, name, operations, commit_message):
        self.uploaded = {one.path_in_repo: one.path_or_fileobj for one in operations}


def private_files(out):
    """What a user keeps in the folder, also in the run's own folders and behind the run's own names."""
    secrets = (
        ".env",
        "key.pem",
        "thesis/a.tex",
        "unet/key.pem",
        "samples/me.png",
        "samples/before/me.png",
        "vae/model.bin",
    )
    for name in secrets:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("secret")
    (out / "dde.png").symlink_to(out / "key.pem")
    (out / "samples" / "step-00000009.png").symlink_to(out / "key.pem")
    for name in ("wandb", "tensorboard", "checkpoints/step-00000001"):
        (out / name).mkdir(parents=True)
        (out / name / "state.json").write_text("{}")


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_what_the_run_wrote_is_uploaded_and_nothing_else(world, tmp_path, monkeypatch, caplog, lora):
    hub, out = Hub(), tmp_path / "mine"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    run = start(world, out, *(["--lora"] if lora else []))
    with caplog.at_level(logging.INFO, "dpo"):
        written = results.write(run)
        result = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        records = {"config.toml", "metrics.jsonl", "README.md", "samples/step-00000001.png", "samples/before/000.png"}
        private_files(out)
        for name in records | {"wandb_id.txt", "failed.txt", "other.safetensors"}:
            (out / name).write_text("x")
        if lora:  # a model of somebody's beside the adapter
            (out / "unet" / "config.json").write_text("x")
        results.upload(run.output, run.config.output, written)
    assert set(hub.uploaded) == result | records and (len(result) == 1) == lora
    as_they_are = {name: path for name, path in hub.uploaded.items() if name not in published.TEXTS}
    assert all(str(path) == str(out / name) for name, path in as_they_are.items())
    assert hub.asked == {"name": "mine", "private": True, "exist_ok": True}
    (listed,) = [line for line in caplog.messages if line.startswith("to the hub, me/mine (private): ")]
    assert set(listed.partition("): ")[2].split(", ")) == set(hub.uploaded)
    assert caplog.messages.index(listed) < caplog.messages.index("uploaded: https://huggingface.co/me/mine")


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "public", "said"),
    [
        ([], None, None),
        (["--hub-public"], None, None),
        ([], True, "me/mine was there before and stays public: all see the files"),
        (["--hub-public"], False, "me/mine was there before and stays private"),
    ],
)
def test_who_sees_the_repository(world, tmp_path, monkeypatch, caplog, flags, public, said):
    hub = Hub(public)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    run = start(world, tmp_path / "mine", "--push-to-hub", *flags)
    caplog.clear()
    results.upload(run.output, run.config.output, [])
    assert hub.asked["private"] == (not flags)
    assert [row.message for row in caplog.records if row.levelno == logging.WARNING] == ([said] if said else [])


def test_an_upload_that_fails_says_how_to_do_it_later(world, tmp_path, monkeypatch, caplog):
    """By the same list of files: `hf upload` would take the whole folder."""
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(reachable=False))
    run = start(world, tmp_path / "my run", "--push-to-hub", "--hub-id", "a/b", "--hub-public")
    caplog.clear()
    results.upload(run.output, run.config.output, [])
    command = (
        f"python -m dpo.train --output '{tmp_path / 'my run'}' --resume latest --push-to-hub --hub-public --hub-id a/b"
    )
    assert caplog.messages == [f"not uploaded to the hub (no network); later: {command}"]


def test_the_hubs_client_takes_these_calls():
    """The stand-in above must not take what the client would not."""
    for name in ("create_repo", "model_info", "create_commit"):
        theirs = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert set(inspect.signature(getattr(Hub, name)).parameters) - {"name"} <= set(theirs), name
    assert list(inspect.signature(huggingface_hub.HfApi.create_commit).parameters)[1:3] == ["repo_id", "operations"]
    operation = huggingface_hub.CommitOperationAdd("unet/config.json", b"{}")
    assert operation.path_in_repo == "unet/config.json" and operation.path_or_fileobj == b"{}"

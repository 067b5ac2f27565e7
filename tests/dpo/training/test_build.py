"""dpo.training.build: which reference a run has, what its policy trains, and what is refused first."""

import pytest

from dpo.common.errors import UserError
from dpo.models.fingerprint import fingerprint
from dpo.models.load import load
from tests.help.running import make_run
from tests.help.worlds import make_pipeline


@pytest.fixture
def build(world, tmp_path):
    return lambda *flags: make_run(world("sd15"), world("pairs"), tmp_path / "run", "--batch-size", "2", *flags)


def test_all_weights_against_a_copy(build, world):
    run = build()
    trained = sum(p.numel() for p in run.model.denoiser.parameters())
    assert sum(p.numel() for p in run.updater.parameters) == trained and run.step.reference is not None
    assert run.fingerprints["model"] == run.fingerprints["reference"] == fingerprint(load(world("sd15")).denoiser)
    assert run.fingerprints["data"] == run.source.fingerprint and run.done == run.position == 0


def test_adapters_against_the_policy_without_them(build):
    run = build("--lora", "--rank", "2")
    assert run.step.reference is not None and all("lora_" in name for name in run.updater.names)
    assert run.speed.pair_flops < build().speed.pair_flops  # no gradient of the weights


def test_a_supervised_run_has_no_reference(build):
    run = build("--method", "sft")
    assert run.step.reference is None and run.recorded is None and run.speed.pair_flops < build().speed.pair_flops / 2


@pytest.mark.parametrize("of", ["init", "base"])
def test_a_policy_that_starts_elsewhere(build, world, tmp_path, of):
    """The reference is where the policy starts, or the model itself."""
    start = make_pipeline(tmp_path / "start", "sd15", seed=1)
    own, other = (fingerprint(load(str(folder)).denoiser) for folder in (world("sd15"), start))
    run = build("--unet-init", str(start), "--reference-model", of)
    assert fingerprint(run.model.denoiser) == other and run.fingerprints["model"] == own
    assert run.fingerprints["reference"] == (other if of == "init" else own)


def test_cheap_mistakes_come_before_loading(build, monkeypatch):
    monkeypatch.setattr("dpo.training.build.load_model", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UserError, match="--vae nowhere: no such folder or file"):
        build("--vae", "nowhere")
    with pytest.raises(UserError, match="no such checkpoint"):
        build("--resume", "nowhere")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started as 2 processes"):
        build()

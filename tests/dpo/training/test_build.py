"""dpo.training.build: which reference a run has, what its policy trains, and what is refused first."""

import pytest
import torch

from dpo.common.errors import UserError
from dpo.models.fingerprint import fingerprint
from dpo.models.load import load
from dpo.training.state import snapshot
from tests.help.running import make_run
from tests.help.worlds import make_pickapic, make_pipeline


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


def test_some_of_ones_own_pairs_are_held_out_and_stay_so(world, tmp_path, caplog):
    """A resumed run has the pairs of its checkpoint on their sides, whatever its command line leaves open."""
    caplog.set_level("INFO", "dpo")
    model, pairs = world("sd15"), str(make_pickapic(tmp_path / "pairs", 160))

    def build(*flags):
        return make_run(model, pairs, tmp_path / "run", "--lora", "--validate-every", "none", *flags)

    def held_out(run):
        return [run.held_out_source[i].key for i in range(len(run.held_out_source))] if run.held_out_source else None

    run = build("--validation-draws", "2")
    assert len(held_out(run)) == 50 and len(run.source) == 110
    every = run.config.output.validate_every
    assert every % 100 == 0 and f"50 pairs, 2 draws each, every {every} updates: " in caplog.text
    snapshot(run)
    for flags in (["--resume", "latest"], ["--resume", "latest", "--validate-every", "0"]):
        again = build(*flags)
        assert held_out(again) == held_out(run) and again.fingerprints == run.fingerprints
    with pytest.raises(UserError, match="cannot resume .*validation_fraction"):
        build("--resume", "latest", "--validation-fraction", "0.2")


def test_a_run_that_held_nothing_out_goes_on_so(world, tmp_path):
    """As runs did before a share was held out unasked: with the same command line no pair changes sides."""
    model, pairs = world("sd15"), str(make_pickapic(tmp_path / "pairs", 160))

    def build(*flags):
        return make_run(model, pairs, tmp_path / "run", "--lora", *flags)

    first = build()
    assert first.config.data.validation_fraction == 0, "nothing is held out where nothing is measured"
    snapshot(first)
    run = build("--validate-every", "100", "--resume", "latest")
    assert run.held_out_source is None and len(run.source) == 160


def test_a_dropped_caption_is_encoded_as_asked(world, tmp_path):
    for words, expected in (([], None), (["--dropped-caption", "zeros"], 0.0)):
        run = make_run(world("sdxl"), world("pairs"), tmp_path / "run", "--lora", "--caption-dropout", "0.5", *words)
        batch = next(run.batches())
        text = run.encoder.inputs(batch).text
        plain = run.encoder.text(batch.captions)
        assert 0 < int(batch.dropped.sum()) < len(batch)
        for found, own in zip(text, plain, strict=True):
            assert torch.equal(found[~batch.dropped], own[~batch.dropped])
            gone = own[batch.dropped] if expected is None else torch.zeros_like(own[batch.dropped])
            assert torch.equal(found[batch.dropped], gone)


def test_the_vae_encodes_in_its_own_precision(world, tmp_path):
    run = make_run(
        world("sdxl"), world("pairs"), tmp_path / "run", "--lora", "--precision", "bf16", "--vae-precision", "fp32"
    )
    assert run.encoder.inputs(next(run.batches())).latent_mean.dtype == torch.float32

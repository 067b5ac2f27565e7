"""dpo.training.build: which reference a run has, what its policy trains, and what is refused first."""

import logging
from types import SimpleNamespace

import pytest
import torch

from dpo.common.errors import UserError
from dpo.data.order import Order
from dpo.models.fingerprint import fingerprint
from dpo.models.load import load
from dpo.settings.config import change, flatten
from dpo.settings.flags import parse
from dpo.training import build as build_module
from dpo.training import samples
from dpo.training.state import as_before, snapshot
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


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_of_bf16_weights_are_fp32_where_they_are_summed(build, caplog, passes):
    caplog.set_level(logging.INFO, "dpo")
    run = build("--precision", "bf16-pure", "--accumulation", str(passes))
    assert {p.grad_dtype for p in run.updater.parameters} == {torch.float32 if passes > 1 else torch.bfloat16}
    assert ("gradients of bf16 weights are summed in fp32" in caplog.text) == (passes > 1)


def test_gradient_release_is_said(build, caplog):
    caplog.set_level(logging.INFO, "dpo")
    assert build("--gradient-release").updater.release is not None and "first is not clipped" in caplog.text


def test_a_supervised_run_has_no_reference(build):
    run = build("--method", "sft")
    assert run.step.reference is None and run.recorded is None and run.speed.pair_flops < build().speed.pair_flops / 2


@pytest.mark.long
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


@pytest.mark.long
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


def test_what_a_resumed_run_left_open_is_as_it_was(world, tmp_path):
    config, _ = parse(["--model", "m", "--data", "d"])
    old = flatten(change(config, validation_data="v", validation_split="s", validation_fraction=0.0))
    del old["dropped_caption"], old["validation_by"]  # settings that there were not
    after = as_before(config, SimpleNamespace(state={"config": old})).data
    assert (after.validation_data, after.validation_split, after.validation_fraction) == ("v", "s", 0.0)
    assert (after.validation_by, after.dropped_caption) == ("auto", "empty")
    said = change(config, validation_fraction=0.1, dropped_caption="zeros")
    assert as_before(said, SimpleNamespace(state={"config": old})) == said


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "asked", "zeros"),
    [("sdxl", "auto", True), ("sdxl", "empty", False), ("sdxl-turbo", "auto", False), ("sdxl-turbo", "zeros", True)],
)
def test_a_dropped_caption_is_what_the_model_is_sampled_with_or_as_asked(world, tmp_path, kind, asked, zeros):
    words = ["--lora", "--caption-dropout", "0.5", "--dropped-caption", asked]
    run = make_run(world(kind), world("pairs"), tmp_path / "run", *words)
    batch = next(run.batches())
    found, plain = run.encoder.inputs(batch).text, run.encoder.text(batch.captions)
    assert 0 < int(batch.dropped.sum()) < len(batch)
    assert found.mask is None and plain.mask is None
    for ours, own in zip(found[:2], plain[:2], strict=True):
        assert torch.equal(ours[~batch.dropped], own[~batch.dropped])
        assert torch.equal(ours[batch.dropped], torch.zeros_like(own[batch.dropped]) if zeros else own[batch.dropped])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "precision", "vae"), [("sdxl", "bf16", "fp32"), ("sd15", "fp32", "bf16")])
def test_the_vae_encodes_and_decodes_in_its_own_precision(world, tmp_path, kind, precision, vae):
    words = [
        "--lora",
        "--precision",
        precision,
        "--vae-precision",
        vae,
        "--sample-prompts",
        "red",
        "--sample-seeds",
        "0",
    ]
    run = make_run(world(kind), world("pairs"), tmp_path / "run", *words, "--sample-steps", "1")
    assert (
        run.encoder.inputs(next(run.batches())).latent_mean.dtype
        == {"fp32": torch.float32, "bf16": torch.bfloat16}[vae]
    )
    samples.before(run)


def test_wrong_data_is_said_before_a_model_is_fetched(world, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *a, **k: pytest.fail("fetched"))
    lora = ("--lora", "--lora-init", "nobody/no-such-lora")
    monkeypatch.setattr("dpo.models.lora_files._downloaded", lambda *a: pytest.fail("fetched"))
    for flags in ((), lora):
        with pytest.raises(UserError, match="nowhere"):
            make_run("nobody/no-such-model", str(tmp_path / "nowhere"), tmp_path / "run", *flags)


@pytest.mark.parametrize(("size", "passes", "advised"), [(1, 4, False), (4, 1, False), (4, 2, True)])
def test_a_smaller_batch_is_advised_only_where_it_leaves_fewer_holes(monkeypatch, caplog, size, passes, advised):
    monkeypatch.setattr(build_module, "run_order", lambda source, order: range(passes * build_module.LOOKED_AT))
    run = SimpleNamespace(
        order=lambda first, last: Order(0, first, size, last), position=0, nominal=4, source=None, things="pairs",
        processes=SimpleNamespace(count=1),
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "dpo"):
        build_module._tell_buckets(run, SimpleNamespace(told=str))
    assert ("smaller --batch-size" in caplog.text) == advised and "% of them holes" in caplog.text


@pytest.mark.long
def test_on_a_device_the_largest_logit_of_step_zero_is_said(world, tmp_path, caplog):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "3", "--precision", "bf16")
    assert "step 0" not in caplog.text, "on a CPU tests hold that it is 0"
    run.device = torch.device("cuda")  # asked for its name alone
    with caplog.at_level(logging.INFO, "dpo"):
        build_module._say_noise(run)
        assert caplog.messages[-1] == "step 0: 12 pairs, largest |logit| 0"
        own = run.step.policy
        run.step.policy = lambda *args: own(*args) * (1 + 2**-6 * torch.is_grad_enabled())
        build_module._say_noise(run)
    said = caplog.messages[-1]
    assert said.startswith("step 0: 12 pairs, largest |logit| ") and "--deterministic" in said
    assert float(said.split("|logit| ")[1].split(",")[0]) > 1e-3

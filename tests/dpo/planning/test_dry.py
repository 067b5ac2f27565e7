"""The dry run takes what the real step takes: bytes within 2 % of what torch's allocator reports, FLOPs exactly."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import peak_of_update
from dpo.common.errors import UserError
from dpo.models import offload, qwen
from dpo.planning import work
from dpo.planning.dry import _cut
from dpo.planning.sketch import sketch
from dpo.settings.config import change
from dpo.settings.flags import parse
from dpo.train import train_step
from dpo.training import sharding
from dpo.training.memory import ATTENTION
from tests.help.running import QUIET, advance, make_run
from tests.help.worlds import make_labelled

CASES = [("sd15", [])]
REST = [
    ("sd35", ["--lora"]),
    ("sdxl", ["--lora", "--accumulation", "2", "--checkpointing", "on"]),
    ("sd15", ["--optimizer", "adafactor", "--ema", "0.99", "--method", "dde", "--accumulation", "2"]),
    ("sd2v", ["--method", "dde-step"]),
    ("sdxl", ["--flip", "--gradient-release"]),
    ("sdxl", ["--optimizer", "adamw8bit", "--checkpointing", "mid_block"]),
    ("sd15", ["--method", "sft"]),
    ("flux2-klein", ["--lora", "--accumulation", "2"]),
    ("flux-dev", ["--checkpointing", "on"]),
    ("qwen-image", ["--lora", "--checkpointing", "on"]),
]


def dry(config):
    return work.planner(train_step)(config)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "flags"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in REST])
def test_bytes_and_flops_are_those_of_the_real_step(world, tmp_path, monkeypatch, kind, flags):
    monkeypatch.setattr(qwen, "LONGEST", 8)  # every caption is longer; a plan takes each for as long as it may be
    check(world(kind), world("pairs"), tmp_path, *flags)


@pytest.mark.slow
def test_so_they_are_of_images_without_partners(world, tmp_path):
    taken = check(world("sd15"), str(make_labelled(tmp_path / "images", 8)), tmp_path, "--method", "kto")
    _, pairs = planned(world, "sd15", "--resolution", "64", "--device", "cpu", "--method", "kto")
    assert (taken.sides, pairs.sides) == (1, 2) and taken.stored_bytes < pairs.stored_bytes
    assert sum(taken.flops.values()) == pytest.approx(sum(pairs.flops.values()) / 2, rel=0.1)  # one caption of each


def check(model, data, tmp_path, *flags):
    flags = ["--batch-size", "8", "--resolution", "64", *QUIET, "--device", "cpu", "--keep-encoded", "off", *flags]
    config, _ = parse(["--model", model, "--data", data, *flags])
    _, taken = dry(config)
    run = make_run(model, data, tmp_path / "run", *flags)
    advance(run, 1)
    assert peak_of_update(run) == pytest.approx(taken.peak, rel=0.02)
    batches = run.batches()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        train_step(run, itertools.islice(batches, run.config.optim.accumulation))
    batches.close()
    assert counter.get_total_flops() == sum(taken.flops.values()) * run.nominal
    assert taken.trained == sum(p.numel() for p in run.updater.parameters)
    assert taken.averaged_bytes == sum(e.nbytes for e in run.updater.ema)
    return taken


def planned(world, kind: str, *flags: str):
    config, _ = parse(["--model", world(kind), "--data", world("pairs"), "--batch-size", "2", *flags])
    return dry(config)


@pytest.mark.slow
def test_on_a_gpu_each_saving_saves_what_it_should(world):
    """Decided as on a GPU: kernels, 8-bit states, bf16; then one change at a time, by kind of memory."""
    config, usual = planned(world, "sdxl")
    assert (config.runtime.kernels, config.optim.optimizer, config.runtime.precision) == ("triton", "adamw8bit", "bf16")
    assert usual.parts["weights"] > 1.8 * usual.parts["reference"] > 0  # fp32 against bf16 under autocast
    assert usual.parts["VAE and text encoders"] and usual.flops["VAE"] and usual.flops["reference's forward"]
    _, store = planned(world, "sdxl", "--data-format", "store", "--reference", "recorded", "--activation-offload")
    assert not {"VAE", "text encoders", "reference's forward"} & {name for name, value in store.flops.items() if value}
    assert "reference" not in store.parts and "VAE and text encoders" not in store.parts
    assert store.peak < usual.peak and store.trained == usual.trained
    assert store.flops["backward"] == usual.flops["backward"]
    assert offload.on_host.__name__ == "on_host" and torch.ones(2).add(1).tolist() == [2, 2]  # nothing is left behind


SHARDED = ["--batch-size", "2", "--optimizer", "adamw", "--precision", "fp32", "--sharding", "on"]


def test_of_shards_the_first_process_is_planned(world):
    """From shapes alone: its share of all that is cut, and what is whole at a time; counts that do not fit are refused."""
    config, _ = parse(["--model", world("sd15"), "--data", world("pairs"), *SHARDED])
    model = sketch(config.model)
    shares, gathered = _cut(config, model, 2)
    share = sharding.first_share(model.denoiser, 2)
    assert shares == dict.fromkeys(("weights", "gradients", "optimizer", "averaged weights", "reference"), share)
    block, around = sharding.largest_block(model.denoiser)
    assert 0.5 <= share < 0.51 and gathered == 4 * (4 * block + around)
    with pytest.raises(UserError, match="shards of 2 processes would cut blocks of 256"):
        _cut(change(config, optimizer="adamw8bit"), model, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_sharded_plan_is_that_of_whole_weights_but_for_the_share(world, kind):
    flags = ["--model", world(kind), "--data", world("pairs"), "--device", "cpu", *SHARDED]
    whole, cut = (work.planner(train_step, 2)(parse([*flags, *more])[0])[1] for more in (["--sharding", "off"], []))
    assert cut.flops == whole.flops and cut.total == whole.total and whole.gathered == 0 < cut.gathered
    of_training = 0
    for kind_of in ("weights", "reference", "gradients", "optimizer"):
        assert cut.parts[kind_of] == pytest.approx(whole.parts[kind_of] / 2, rel=0.02), kind_of
        of_training += whole.parts[kind_of]
    assert whole.peak - cut.peak == pytest.approx(of_training / 2, rel=0.02)
    assert cut.state_bytes == pytest.approx(whole.state_bytes, rel=0.01) and cut.trained_bytes == whole.trained_bytes


@pytest.mark.slow
def test_plain_torch_saves_more_for_backward_than_the_kernels(world):
    """Under CUDA's autocast norms run in fp32, and what they save is twice as large."""
    taken = {kernels: planned(world, "sd15", "--kernels", kernels)[1] for kernels in ("triton", "torch")}
    assert taken["torch"].peak > 1.1 * taken["triton"].peak
    assert taken["torch"].flops == taken["triton"].flops


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["bnb-adamw8bit", "paged-adamw8bit", "lion8bit", "adamw", "adamw8bit"])
def test_every_optimizer_has_its_states(optimizer):
    _, taken = dry(work.prepared(parse(["--batch-size", "2", "--optimizer", optimizer, "--ema", "0.9"])[0]))
    each = {"lion8bit": 1, "adamw": 8}.get(optimizer, 2)
    assert taken.state_bytes == pytest.approx(each * taken.trained, rel=0.1)  # small tensors keep fp32 moments
    assert taken.averaged_bytes == 4 * taken.trained

"""A run whose weights are cut over processes: the training, the figures and the files of one process that has them all."""

import itertools
import os
import shutil
import signal

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from dpo.train import train_step
from dpo.training import checkpoint, state, validation
from tests.help.commands import command
from tests.help.processes import close, codes, together, updates
from tests.help.running import make_run

EXACT = ["--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4", "--seed", "3", "--batch-size", "1"]
HELD_OUT = [
    "--validate-every",
    "5",
    "--validation-fraction",
    "0.3",
    "--validation-by",
    "pair",
    "--validation-draws",
    "2",
]
CUT = [*EXACT, "--effective-batch", "2", "--sharding", "on"]  # of a run that is started as a command
SETTINGS = {
    "dpo": [*HELD_OUT, "--caption-dropout", "0.3", "--ema", "0.9"],
    "dde": ["--method", "dde", "--checkpointing", "on"],
    "recorded": ["--method", "dde", "--reference", "recorded"],
}


def make(model, pairs, output, name, processes=None, resume=None):
    flags = [*EXACT, "--effective-batch", "4", *SETTINGS[name], *(["--resume", str(resume)] if resume else [])]
    return make_run(model, pairs, output, *flags, *(["--sharding", "on"] if processes else []), processes=processes)


def advanced(run, updates):
    """The run after `updates` more: whole tensors by group (in the first process), figures, held-out accuracy."""
    figures, batches = [], run.batches()
    for _ in range(updates):
        figures.append(train_step(run, itertools.islice(batches, run.config.optim.accumulation)))
        run.count()
    batches.close()
    with run.updater.averaged():
        held_out = validation.accuracy(run.step, run.held_out) if run.held_out else {}
    found = state.held(run)
    optimizer, _ = checkpoint.pack(found.optimizer) if found.optimizer else ({}, {})
    groups = {"policy": found.policy, "averaged": found.averaged, "optimizer": optimizer, "tables": run.table.tensors()}
    return (
        {group: {k: v.detach().clone() for k, v in tensors.items()} for group, tensors in groups.items()},
        figures,
        held_out,
    )


def agree(found, alone, tolerance=1e-10):
    (groups, figures, held_out), (expected, own, held) = found, alone
    for group, tensors in expected.items():
        assert groups[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert (groups[group][name].double() - value.double()).abs().max() < tolerance, (group, name)
    for a, b in zip(figures, own, strict=True):
        assert [key for key in b if not close(a[key], b[key], 1e-8)] == []
    assert all(close(held_out[key], held[key], 1e-10) for key in held)


def test_a_sharded_run_is_the_run_of_one_process(world, tmp_path):
    model, pairs = world("sd15"), world("pairs")
    alone = make(model, pairs, tmp_path / "one", "dpo")
    expected = [advanced(alone, 2), advanced(alone, 1)]

    def work(processes):
        run = make(model, pairs, tmp_path / "cut", "dpo", processes)
        found = advanced(run, 2)
        processes.once(state.snapshot, run, state.held(run))
        return found

    first, other = together(2, work, tmp_path)
    agree(first, expected[0])
    assert not other[0]["policy"] and other[1:] == first[1:]  # the same figures, and no whole tensor
    resumed = make(model, pairs, tmp_path / "cut", "dpo", resume="latest")
    agree(advanced(resumed, 1), expected[1])


def wide(model, folder):
    """The pipeline with a UNet whose halves end where blocks of 8-bit states end."""
    shutil.copytree(model, folder)
    small = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**small.config, "block_out_channels": (32, 64)}).save_pretrained(folder / "unet")
    return str(folder)


def result(folder):
    (file,) = (folder / "unet").glob("*.safetensors")
    return load_file(file)


@pytest.mark.slow
def test_result_and_images_are_those_of_one_process(launched, start, tmp_path, capsys, brief):
    more = ["--steps", "2", "--ema", "0.5"]
    assert codes(launched(*CUT, *more)) == [0, 0]
    alone = [*start, *EXACT, "--effective-batch", "2", *more, "--output", tmp_path / "alone"]
    assert command(capsys, *alone).code == 0
    found, expected = result(tmp_path / "out"), result(tmp_path / "alone")
    assert found.keys() == expected.keys()
    assert all((found[name] - value).abs().max() < 1e-6 for name, value in expected.items())  # both are rounded to fp32
    images = [sorted((tmp_path / folder / "samples").rglob("*.png")) for folder in ("out", "alone")]
    assert [path.name for path in images[0]] == [path.name for path in images[1]] and len(images[0]) == 2
    assert images[0][0].read_bytes() == images[1][0].read_bytes()  # of the model before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_8_bit_states_under_sharding(world, tmp_path, precision):
    """Step 0 is exact, and the checkpoint of two processes is that of one: put back and asked for again, the same bits."""
    model, pairs = wide(world("sd15"), tmp_path / "model"), world("pairs")
    flags = ["--precision", precision, "--optimizer", "adamw8bit", "--effective-batch", "4", "--batch-size", "1"]
    flags += ["--channels-last", "on"]

    def work(processes):
        run = make_run(model, pairs, tmp_path / "cut", *flags, "--sharding", "on", processes=processes)
        found = advanced(run, 3)
        processes.once(state.snapshot, run, state.held(run))
        return found

    groups, figures, _ = together(2, work, tmp_path)[0]
    assert figures[0]["margin_p10"] == figures[0]["margin_p90"] == 0 < figures[0]["grad_norm"]
    resumed = make_run(model, pairs, tmp_path / "cut", *flags, "--resume", "latest")
    again, _, _ = advanced(resumed, 0)
    for group, tensors in groups.items():
        assert all(torch.equal(again[group][name], value) for name, value in tensors.items()), group
    alone, own, _ = advanced(make_run(model, pairs, tmp_path / "alone", *flags), 1)
    assert close(figures[0]["grad_norm"], own[0]["grad_norm"], 1e-2)
    assert torch.equal(groups["optimizer"]["layout"], alone["optimizer"]["layout"])


@pytest.mark.slow
def test_a_stop_of_one_is_agreed_by_all_and_kept(launched, tmp_path, brief):
    first, second = launched(*CUT, "--steps", "500", "--no-samples", until=2)
    os.kill(second, signal.SIGTERM)
    assert codes([first, second]) == [130, 130]
    done = len(updates(tmp_path / "out"))
    assert f"stopped after update {done} of 500; checkpoint" in (tmp_path / "said-0").read_text("utf-8")
    assert codes(launched(*CUT, "--no-samples", "--resume", "latest", "--steps", str(done + 1))) == [0, 0]
    assert len(updates(tmp_path / "out")) == done + 1


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_last_checkpoint_goes_on(launched, start, tmp_path, capsys, brief):
    children = launched(*CUT, "--steps", "500", "--no-samples", "--checkpoint-every", "2", until=3)
    os.kill(children[1], signal.SIGKILL)
    assert codes(children) == [2, -signal.SIGKILL]
    said = (tmp_path / "said-0").read_text("utf-8")
    assert "each process holds a part of the weights" in said and "a process of this run died" in said
    words = [*start, *EXACT, "--effective-batch", "2", "--no-samples", "--resume", "latest"]
    last = max(checkpoint.listing(tmp_path / "out" / "checkpoints"))
    went_on = command(capsys, *words, "--steps", int(last.name.split("-")[1]) + 1)
    assert went_on.code == 0 and updates(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_updates_and_a_resume_on_other_numbers_of_processes(world, recorded_store, tmp_path, name):
    """20 updates on 2 processes; then on from there: 2 on one process, and 2 more on 4."""
    model, pairs = world("sd15"), recorded_store if name == "recorded" else world("pairs")
    alone = make(model, pairs, tmp_path / "one", name)
    expected = [advanced(alone, updates) for updates in (20, 2, 2)]

    def on(count, updates):
        def work(processes):
            run = make(model, pairs, tmp_path / "cut", name, processes, resume="latest" if count == 4 else None)
            found = advanced(run, updates)
            processes.once(state.snapshot, run, state.held(run))
            return found

        return together(count, work, tmp_path)[0]

    agree(on(2, 20), expected[0])
    run = make(model, pairs, tmp_path / "cut", name, resume="latest")
    agree(advanced(run, 2), expected[1])
    state.snapshot(run)
    agree(on(4, 2), expected[2])

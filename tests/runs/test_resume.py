"""Invariant: k updates + save + load + k updates equal 2k updates, bit for bit.

A kill costs at most the work since the last checkpoint.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dpo.common.errors import UserError
from dpo.training import checkpoint
from dpo.training.state import restore, snapshot
from tests.help.children import start_command
from tests.help.flow import SMALL, TRAINED
from tests.help.running import advance, everything, make_run
from tests.help.worlds import alter_one, make_folders, make_pipeline

RUNS = {
    "full": [],
    "lora": ["--lora", "--learning-rate", "1e-3"],
    "lora with dropout": ["--lora", "--lora-dropout", "0.3", "--learning-rate", "1e-3"],
    "8-bit": ["--optimizer", "adamw8bit"],
    "8-bit of bitsandbytes": ["--optimizer", "bnb-adamw8bit"],
    "bf16 weights, rounded stochastically": ["--precision", "bf16-pure", "--learning-rate", "1e-4"],
    "lion 8-bit": ["--optimizer", "lion8bit"],
    "adafactor": ["--optimizer", "adafactor"],
    "dde with averaged weights": ["--method", "dde", "--ema", "0.9"],
    "cosine, dropout, flips": ["--scheduler", "cosine", "--caption-dropout", "0.5", "--flip", "--crop", "random"],
    "bf16": ["--precision", "bf16"],
    "mapo": ["--method", "mapo"],
    "gradient release": [
        *["--gradient-release", "--batch-size", "6", "--accumulation", "1", "--optimizer", "adamw8bit"],
        *["--max-grad-norm", "1e-3", "--ema", "0.9"],  # clips: the norm of the update before counts
    ],
}


SLOW = ("lion 8-bit", "adafactor", "bf16", "mapo")  # others of these kinds are tested each time


FLOWS = [(kind, [*SMALL, *flags]) for kind in TRAINED for flags in (["--timestep-draw", "logit-normal"], ["--lora"])]


@pytest.mark.parametrize(
    "kind, flags",
    [
        *(
            pytest.param("sd15", flags, id=name, marks=[pytest.mark.slow] * (name in SLOW))
            for name, flags in RUNS.items()
        ),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FLOWS),
    ],
)
def test_resume_is_exact(world, tmp_path, kind, flags):
    """The run that writes the checkpoint goes on too, and both end alike."""
    flags = ["--batch-size", "3", "--accumulation", "2", "--steps", "4", *flags]  # 24 pairs of 41: not a whole epoch
    straight = make_run(world(kind), world("pairs"), tmp_path / "run", *flags)
    advance(straight, 2)
    snapshot(straight)
    second = make_run(world(kind), world("pairs"), tmp_path / "run", *flags, "--resume", "latest")
    assert (second.done, second.position) == (2, 12)
    advance(second, 2)
    advance(straight, 2)
    expected, found = everything(straight), everything(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


TINY = ["--batch-size", "2", "--accumulation", "1", "--steps", "4"]


@pytest.fixture
def begun(world, tmp_path):
    """A run of two updates on copies of model and pairs, with its checkpoint; what makes it go on."""
    model = shutil.copytree(world("sd15"), tmp_path / "model")
    pairs = make_folders(tmp_path / "pairs", 6)
    run = make_run(str(model), str(pairs), tmp_path / "out", *TINY)
    advance(run, 1)
    snapshot(run)
    return lambda: make_run(str(model), str(pairs), tmp_path / "out", *TINY, "--resume", "latest")


@pytest.mark.parametrize(
    ("part", "words"), [("vae", "another VAE"), ("text_encoder", "other text encoders"), ("unet", "another model")]
)
def test_another_part_of_the_model_is_refused(begun, tmp_path, part, words):
    """Under the same names the files have other weights."""
    other = make_pipeline(tmp_path / "other", "sd15", seed=7)
    shutil.copytree(other / part, tmp_path / "model" / part, dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"was trained from {words}"):
        begun()


@pytest.mark.parametrize(
    ("part", "words"), [("vae", "another VAE"), ("text_encoder", "other text encoders"), ("unet", "another model")]
)
def test_one_altered_weight_is_refused(begun, tmp_path, part, words):
    """Of a tensor of thousands, a value that the short fingerprint does not read."""
    alter_one(next((tmp_path / "model" / part).glob("*.safetensors")))
    with pytest.raises(UserError, match=f"was trained from {words}"):
        begun()


@pytest.mark.parametrize(("name", "words"), [("reference", "another reference"), ("start", "other starting weights")])
def test_other_weights_to_compare_with_are_refused(begun, tmp_path, name, words):
    run = begun()
    run.fingerprints["start"] = run.fingerprints["reference"]
    snapshot(run)
    run.fingerprints[name] = "0" * 16
    with pytest.raises(UserError, match=f"was trained from {words}"):
        restore(run, checkpoint.find(run.checkpoints, "latest"))


def test_images_swapped_in_place_are_said(begun, tmp_path, caplog):
    begun()
    assert "were changed" not in caplog.text
    name = next(path.name for path in (tmp_path / "pairs" / "w").iterdir() if path.suffix == ".jpg")
    win, lose = (tmp_path / "pairs" / side / name for side in "wl")
    data = win.read_bytes(), lose.read_bytes()
    win.write_bytes(data[1])
    lose.write_bytes(data[0])
    begun()
    assert "image files of the training pairs were changed since the checkpoint" in caplog.text


def test_a_checkpoint_without_these_fingerprints_goes_on(begun):
    run = begun()
    for name in ("reference", "vae", "text", "images", "image_times", "model_checksum", "vae_checksum"):
        del run.fingerprints[name]
    snapshot(run)
    assert begun().done == 1


@pytest.mark.parametrize("name", ["flux2-klein-base", pytest.param("qwen-image", marks=pytest.mark.slow)])
def test_positions_that_an_earlier_version_rounded_are_said(world, tmp_path, caplog, name):
    flags = [world(name), world("pairs"), tmp_path / "run", "--precision", "bf16", "--lora", "--steps", "2"]
    run = make_run(*flags)
    assert run.fingerprints["positions"] == "fp32"
    advance(run, 1)
    snapshot(run)
    make_run(*flags, "--resume", "latest")
    assert "rounded the positions" not in caplog.text
    del run.fingerprints["positions"]
    snapshot(run)
    assert make_run(*flags, "--resume", "latest").done == 1
    assert "an earlier version, which rounded the positions in the text encoder to half precision" in caplog.text


def words(world, output, *flags):
    """The command line of a small run, without the command."""
    base = [
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--output",
        str(output),
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    more = ["--validate-every", "0", "--sample-steps", "1", "--sample-seeds", "0", "--sample-prompts", "red"]
    return [*base, *more, *flags]


def going_on(output):
    """--resume latest where there is a checkpoint, else a new start."""
    return ["--resume", "latest"] if any((output / "checkpoints").glob("step-*")) else ["--overwrite"]


def killed_at(world, output, seconds, *flags):
    """Starts or continues a run in a child process and kills it (SIGKILL) after `seconds`; its exit status."""
    line = [sys.executable, "-m", "dpo.train", *words(world, output, *flags), *going_on(output)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    return process.returncode, errors


def final_policy(output):
    return checkpoint.find(output / "checkpoints", "latest").tensors["policy"]


def run_to_the_end(world, output, *flags):
    code, errors = killed_at(world, output, 600, *flags)
    assert code == 0, errors


@pytest.mark.slow
def test_killed_at_20_random_moments_it_always_resumes(world, tmp_path):
    flags = ["--steps", "300", "--checkpoint-every", "5", "--method", "dde"]
    run_to_the_end(world, tmp_path / "straight", *flags)
    dice = random.Random(0)
    for _ in range(20):
        code, errors = killed_at(world, tmp_path / "killed", dice.uniform(2, 14), *flags)
        assert code in (-signal.SIGKILL, 0), errors
    run_to_the_end(world, tmp_path / "killed", *flags)
    expected, found = final_policy(tmp_path / "straight"), final_policy(tmp_path / "killed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_kill_9_then_resume_equals_the_straight_run(world, tmp_path):
    flags = ["--steps", "8", "--checkpoint-every", "1"]
    output = tmp_path / "killed"
    child = start_command(words(world, output, *flags), tmp_path / "log.txt")
    wait_for(lambda: len(list((output / "checkpoints").glob("step-*"))) >= 2, child)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (output / "model_index.json").exists(), "it was killed before its end"
    child = start_command(words(world, output, *flags, "--resume", "latest"), tmp_path / "log.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (tmp_path / "log.txt").read_text()
    straight = make_run(world("sd15"), world("pairs"), tmp_path / "straight", "--batch-size", "2", "--steps", "8")
    advance(straight, 8)
    expected = dict(zip(straight.updater.names, straight.updater.parameters))
    found = final_policy(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def figures_of_three_updates(output):
    """Whether three updates are in the figures of a run."""
    path = output / "metrics.jsonl"
    return path.exists() and path.read_text().count('"loss"') > 2


def check_stopped(output, code, errors):
    assert code == 130
    assert "--resume latest" in errors and "Traceback" not in errors
    assert len(list((output / "checkpoints").glob("step-*"))) == 1
    assert (output / "report.html").exists()


def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(world, tmp_path):
    output = tmp_path / "stopped"
    child = start_command(words(world, output, "--steps", "100000"), tmp_path / "log.txt")
    wait_for(lambda: figures_of_three_updates(output), child)
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check_stopped(output, code, (tmp_path / "log.txt").read_text())


def test_ctrl_c_ends_the_program_itself_in_order(world, tmp_path):
    """Started as a person does: also what `python -m dpo.train` does after `main` is tested."""
    output = tmp_path / "stopped"
    line = [sys.executable, "-m", "dpo.train", *words(world, output, "--steps", "100000")]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind `&` hands on that it is ignored
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
    wait_for(lambda: figures_of_three_updates(output), process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    check_stopped(output, process.returncode, errors)


def wait_for(condition, child, seconds=300):
    """Waits until `condition` holds, while the child of that process id is at work."""
    end = time.monotonic() + seconds
    while not condition():
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, (
            "the run ended before it could be stopped"
        )
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("scheduler", "changed", "said"),
    [("cosine", ["--steps", "8"], True), ("constant", ["--steps", "8"], False), ("linear", [], False)],
)
def test_a_learning_rate_that_jumps_on_resume_is_said(world, tmp_path, caplog, scheduler, changed, said):
    flags = ["--scheduler", scheduler, "--steps", "4", "--learning-rate", "1e-5", *TINY]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    advance(run, 2)
    snapshot(run)
    caplog.clear()
    make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags, *changed, "--resume", "latest")
    told = [record.getMessage() for record in caplog.records if "learning rate of update 3" in record.getMessage()]
    assert bool(told) == said
    assert not said or "5e-06 by the checkpoint's schedule, now 8.53553e-06" in told[0]

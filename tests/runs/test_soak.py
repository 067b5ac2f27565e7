"""A hundred kills at random moments, with forks and double starts between them: every run ends as if nothing had been."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from dpo import prepare
from dpo.pages.folder import METRICS_FILE, read_records
from dpo.training import checkpoint
from tests.help.children import start, start_command

UPDATES = 400
SMALL = ["--batch-size", "2", "--accumulation", "1", "--workers", "0", "--log-every", "1"]
PLAN = ["--steps", str(UPDATES), "--checkpoint-every", "4", "--checkpoints-limit", "6"]
QUIET = ["--validate-every", "0", "--sample-steps", "1", "--sample-seeds", "0", "--sample-prompts", "red"]
RUNS = {
    "full": [],
    "lora": ["--lora", "--learning-rate", "1e-3"],
    "dde": ["--method", "dde", "--scheduler", "cosine"],
    "averaged": ["--ema", "0.9", "--optimizer", "adamw8bit"],
    "prepared": ["--reference", "recorded", "--draws", "2"],
}
KILLS = 20  # of each


@pytest.fixture(params=RUNS, ids=str)
def line(request, world, tmp_path):
    """The command line of a run, without its output; a prepared one's store was killed too while it was made."""
    flags, data = RUNS[request.param], world("pairs")
    if request.param == "prepared":
        data, flags = str(prepared_through_kills(world, tmp_path / "store")), flags[:2]
    return ["--model", world("sd15"), "--data", data, *SMALL, *PLAN, *QUIET, *flags]


def prepared_through_kills(world, store):
    """A store with recorded errors, of which each command is killed at 5 random moments before it may end."""
    make = ["--model", world("sd15"), "--data", world("pairs"), "--store", str(store), "--batch-size", "2"]
    for words in (make, [*make, "--reference", "--draws", "2"]):
        dice = random.Random(len(words))
        for _ in range(5):
            killed(start(lambda words=words: os._exit(prepare.main(words))), dice.uniform(0.1, 3))
        child = start(lambda words=words: os._exit(prepare.main(words)))
        assert os.waitpid(child, 0)[1] == 0
    return store


def killed(child, seconds):
    """Kills a child after `seconds`; its exit code where it ended before, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def finished(child, log):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, log.read_text()[-3000:]


def going_on(output):
    """What continues a run: its newest checkpoint, or a new start where there is none yet."""
    return ["--resume", "latest"] if checkpoint.listing(output / "checkpoints") else ["--overwrite"]


def state_of(output):
    """(every tensor of the last checkpoint, the loss of each update in the order of the file)."""
    found = checkpoint.find(output / "checkpoints", "latest")
    tensors = {f"{group}.{name}": value for group, part in found.tensors.items() for name, value in part.items()}
    return tensors, [
        (record["step"], record["loss"]) for record in read_records(output / METRICS_FILE) if "loss" in record
    ]


@pytest.mark.slow
def test_killed_forked_and_started_twice_it_ends_the_same(line, tmp_path):
    straight, output, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log.txt"
    finished(start_command([*line, "--output", str(straight)], log), log)
    tensors, losses = state_of(straight)
    assert [step for step, _ in losses] == list(range(1, UPDATES + 1))
    dice = random.Random(len(" ".join(line)))
    forks = []
    for number in range(KILLS):
        child = start_command([*line, "--output", str(output), *going_on(output)], log)
        if number % 5 == 2:  # a second start beside the first: one line, and nothing of the first is harmed
            time.sleep(dice.uniform(0.5, 2))
            second = start_command(
                [*line, "--output", str(output), "--resume", "latest"], said := tmp_path / "second.txt"
            )
            code = killed(second, 30)
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                assert (
                    code == 2 and len([words for words in said.read_text().splitlines() if "dpo.train:" in words]) == 1
                )
                killed(child, dice.uniform(0, 2))
            said.unlink()
            continue
        code = killed(child, dice.uniform(0.3, 5))
        assert code in (None, 0), log.read_text()[-3000:]
        made = checkpoint.listing(output / "checkpoints")
        if number % 5 == 4 and len(made) > 1:
            forks.append(fork := tmp_path / f"fork-{number}")  # elsewhere, from any checkpoint
            killed(start_command([*line, "--output", str(fork), "--resume", str(dice.choice(made))], log), 3)
            back = start_command([*line, "--output", str(output), "--resume", str(made[0])], log)  # and back in itself
            killed(back, dice.uniform(1, 4))
        shutil.rmtree(output / "checkpoints" / "abandoned-1", ignore_errors=True)
    for place in (output, *forks):
        made = checkpoint.listing(place / "checkpoints")
        finished(start_command([*line, "--output", str(place), *going_on(place)], log), log)
        found, seen = state_of(place)
        assert found.keys() == tensors.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], found[name])] == []
        if place == output or not made:
            assert seen == losses
    assert not list(output.rglob("*.part-*")), "what the killed left is gone"

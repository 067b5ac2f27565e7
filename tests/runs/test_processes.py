"""One run on several processes: the same training as on one, whole checkpoints, and one clear end."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from dpo.common.errors import Elsewhere, UserError
from dpo.train import main, train_step
from dpo.training import build, checkpoint, validation
from dpo.training.parallel import DIED, Died, Processes
from dpo.training.rescue import known
from dpo.training.state import snapshot
from tests.help.children import start_command
from tests.help.commands import command
from tests.help.processes import (
    close,
    codes,
    commands,
    end,
    free_port,
    together,
    updates,
    wait_for_updates,
)
from tests.help.running import advance, everything, make_run, weights
from tests.help.worlds import make_pickapic

EXACT = ["--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4", "--seed", "3"]
HELD_OUT = [
    "--validate-every",
    "5",
    "--validation-fraction",
    "0.32",
    "--validation-pairs",
    "7",
    "--validation-by",
    "pair",
    "--validation-draws",
    "1",
]
FOUR = ["--effective-batch", "4", "--batch-size", "1", "--no-samples"]  # of a run that is started as a command
RECORDED = [*EXACT, "--method", "dde", "--reference", "recorded", "--batch-size", "1", "--effective-batch", "4"]

# By name: updates (the slow test makes 20 of each), and the flags of a run.
SETTINGS = {
    "dpo": (2, [*EXACT, *HELD_OUT, "--flip", "--crop", "random", "--caption-dropout", "0.3", "--ema", "0.9"]),
    "lora": (1, [*EXACT, "--lora", "--lora-dropout", "0.3", "--rank", "1", "--checkpointing", "on", "--offload", "on"]),
    "recorded": (6, RECORDED),
    "sft": (1, [*EXACT, "--method", "sft"]),
    "single": (1, ["--precision", "fp32", "--optimizer", "adamw8bit"]),
    "half": (1, ["--precision", "bf16-pure"]),
    "sdpo": (0, [*EXACT, "--method", "sdpo"]),
    "target": (0, [*EXACT, "--target-gradient-factor", "0.2"]),
    "kto": (0, [*EXACT, "--method", "kto"]),
    "apo-zero": (0, [*EXACT, "--loss", "apo-zero"]),
    "dde": (0, [*EXACT, "--method", "dde", "--checkpointing", "on"]),  # in the slow test alone
}
SINGLE = ("single", "half")  # no float64: their first gradient is compared
TRIED = {
    2: ("dpo", "lora", "recorded", "sft", "single", "half"),
    4: ("recorded",),
}  # by number of processes; the slow test tries all on both


@pytest.fixture(scope="module")
def made(world, recorded_store, tmp_path_factory):
    """A function of a name in SETTINGS, and of one of several processes: what its run comes to."""
    folder = tmp_path_factory.mktemp("made")
    world("sd15"), world("pairs")

    def result(name: str, processes=None, updates: int | None = None) -> dict:
        few, flags = SETTINGS[name]
        pairs = recorded_store if name == "recorded" else world("pairs")
        flags = ["--batch-size", "1", "--effective-batch", "4", *flags]
        run = make_run(world("sd15"), pairs, folder / name, *flags, processes=processes)
        seen, figures, gradients, update = [], [], [], run.updater.update
        batches = run.batches()

        def watched(micro_batches):
            for batch in micro_batches:
                seen.append((batch.position, batch.keys.tolist(), batch.captions))
                yield batch

        def kept(*of_update):
            gradients.append([p.grad.clone() for p in run.updater.parameters])
            update(*of_update)

        run.updater.update = kept
        for _ in range(updates or few):
            figures.append(train_step(run, watched(itertools.islice(batches, run.config.optim.accumulation))))
            run.count()
        batches.close()
        found = validation.accuracy(run.step, run.held_out) if run.held_out else {}
        passes = run.config.optim.accumulation
        return {"state": everything(run), "figures": figures, "seen": seen, "gradients": gradients[0], "held out": found,
                "passes": passes}  # fmt: skip

    return result


def at(folder: Path, world, recorded_store, steps: int, processes=None, *flags: str) -> dict:
    """The state of a run in `folder` after `steps` updates, made anew or gone on with, and kept there."""
    run = make_run(world("sd15"), recorded_store, folder, *RECORDED, *flags, processes=processes)
    advance(run, steps - run.done)
    run.processes.once(snapshot, run)
    return everything(run)


@pytest.fixture(scope="module")
def runs(made, world, recorded_store, tmp_path_factory):
    """What 1, 2 and 4 processes make: results by their number, then process, then name.

    "resumed" is a run of two updates each on 2 processes, on 1, and on 4.
    """
    folder = tmp_path_factory.mktemp("runs")
    make_pickapic(folder / "broken", 8, broken=("corrupt", "empty"))
    found = {1: [{name: made(name) for name in TRIED[2]}]}
    for count, steps in ((2, 2), (4, 6)):
        goes_on = () if count == 2 else ("--resume", "latest")

        def work(processes, steps=steps, goes_on=goes_on):
            results = {name: made(name, processes) for name in TRIED[processes.count]}
            results["resumed"] = at(folder / "resumed", world, recorded_store, steps, processes, *goes_on)
            if processes.count == 2:
                results["wrong"] = wrong(processes, world, folder)
            return results

        found[count] = together(count, work, folder)
        if count == 2:
            at(folder / "resumed", world, recorded_store, 4, None, "--resume", "latest")
    return found


def wrong(processes, world, folder: Path) -> dict[str, str]:
    """What two processes say where they differ, or see too many broken images; rank 1 alone does the wrong."""
    said = {}

    def refused(name, work):
        with pytest.raises(UserError) as caught:
            work()
        said[name] = str(caught.value)

    asked = ["--seed", str(processes.rank)]
    refused("settings", lambda: make_run(world("sd15"), world("pairs"), folder / "wrong", *asked, processes=processes))
    run = make_run(world("sd15"), world("pairs"), folder / "wrong", processes=processes)
    before = weights(run)
    advance(run, 1)
    with torch.no_grad():
        run.updater.parameters[-1].view(-1)[0] += 1e-6 * processes.rank
    run.compared = False  # as after 100 updates
    refused("weights", lambda: advance(run, 1))
    assert not torch.equal(before[run.updater.names[0]], weights(run)[run.updater.names[0]])
    flags = ["--bad-image-limit", "0", "--batch-size", "4", "--validation-fraction", "0"]
    run = make_run(world("sd15"), str(folder / "broken"), folder / "wrong", *flags, processes=processes)
    refused("images", lambda: advance(run, 4))
    return said


def check_same(alone: dict, every: list[dict]) -> None:
    """A run on several processes is that on one: pairs and their order, state, figures, held-out accuracy."""
    assert sorted(place for found in every for place in found["seen"]) == alone["seen"]
    for found in every:
        assert found["passes"] * len(every) == alone["passes"]
        check_state(alone["state"], found["state"])
        for theirs, own in zip(found["figures"], alone["figures"], strict=True):
            assert [key for key in own if not close(theirs[key], own[key], 1e-8)] == []
        for name, value in alone["held out"].items():
            assert close(found["held out"][name], value, 1e-12 if name == "heldout_difference" else 0), name


def check_state(expected: dict, found: dict) -> None:
    assert found.keys() == expected.keys()
    far = [name for name, value in expected.items() if not (found[name].double() - value.double()).abs().max() < 1e-10]
    assert far == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count, names in TRIED.items() for name in names if name not in SINGLE]
)
def test_the_number_of_processes_changes_the_order_of_sums_alone(runs, count, name):
    check_same(runs[1][0][name], [found[name] for found in runs[count]])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_it_does_so_in_a_longer_run_of_every_kind(made, tmp_path, count):
    def work(processes=None):
        return {name: made(name, processes, 1 if name in SINGLE else 20) for name in SETTINGS}

    alone, every = work(), together(count, work, tmp_path)
    for name in SETTINGS:
        check = check_first_gradient if name in SINGLE else check_same
        check(alone[name], [found[name] for found in every])


def check_first_gradient(alone: dict, every: list[dict]) -> None:
    """Later weights cannot be compared: AdamW turns the rounding of a gradient near zero into a whole step."""
    size = torch.stack([g.norm() for g in alone["gradients"]]).norm()
    for found in every:
        both = zip(found["gradients"], alone["gradients"], strict=True)
        assert torch.stack([(a - b).norm() for a, b in both]).norm() / size < 1e-6
    first, *others = (found["state"] for found in every)
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)  # 8-bit states, bf16 weights


@pytest.mark.long
@pytest.mark.parametrize("name", SINGLE)
def test_the_first_gradient_in_single_precision(runs, name):
    check_first_gradient(runs[1][0][name], [found[name] for found in runs[2]])


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(runs):
    """Two updates each on 2 processes, 1 and 4 are the six on one: pairs, learning rate, states and DDE's table go on."""
    for found in runs[4]:
        check_state(runs[1][0]["recorded"]["state"], found["resumed"])


@pytest.mark.long
def test_processes_that_differ_end_in_one_line(runs):
    first, second = (found["wrong"] for found in runs[2])
    assert first == second
    assert first["settings"].startswith("process 1 has another setting seed than process 0 ('1', not '0'): start all")
    assert first["weights"].startswith(
        "process 1 has other weights (conv_out.bias) than process 0: each trains a model"
    )


@pytest.mark.long
def test_unreadable_images_are_counted_over_all_processes(runs):
    first, second = (found["wrong"]["images"] for found in runs[2])
    assert first == second and first.startswith("2 of 10 pairs have an unreadable image, the last: ")


@pytest.mark.long
def test_held_out_pairs_are_dealt_out_unevenly(runs):
    assert runs[1][0]["dpo"]["held out"]["heldout_pairs"] % 2  # else the test above shows less than it should


def lines(folder: Path, rank: int) -> list[str]:
    """What a process wrote, without what is only logged."""
    text = (folder / f"said-{rank}").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and " INFO " not in line and "c10d" not in line]


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_run_goes_on(launched, start, tmp_path, capsys, brief):
    children = launched(*FOUR, "--steps", "500", until=2)
    os.kill(children[1], signal.SIGKILL)
    assert codes(children) == [2, -signal.SIGKILL]
    *logged, last = lines(tmp_path, 0)
    assert last.startswith("dpo.train: a process of this run died: ") and last.endswith("--resume latest")
    done = len(updates(tmp_path / "out"))
    assert (
        f"stopped after update {done} of 500; checkpoint" in logged[-2]
        and "go on with: torchrun --nproc-per-node 2 -m dpo.train " in logged[-1]
    )
    said = command(capsys, "--output", tmp_path / "out", "--resume", "latest", "--steps", done + 1)
    assert said.code == 0 and len(updates(tmp_path / "out")) == done + 1 and said.warnings("changed on resume") == []


@pytest.mark.parametrize(
    ("rank", "kept", "how"),
    [
        (0, True, "go on with --resume latest"),
        (0, False, "no checkpoint was written yet: --resume latest starts anew"),
        (1, True, "go on with --resume latest"),
        (1, False, "--resume latest goes on from the last checkpoint, or anew where there is none"),
    ],
)
def test_after_a_death_what_is_there_to_go_on_from_is_said(tmp_path, rank, kept, how):
    if kept:
        checkpoint.save(checkpoint.folder_of(tmp_path, 3), {}, {})
    run = SimpleNamespace(checkpoints=tmp_path, processes=Processes(rank, 2))
    found = known(run, Died())
    assert str(found) == DIED + how and isinstance(found, Died)
    assert known(run, KeyboardInterrupt()).args == ()


def test_of_those_that_are_left_one_speaks():
    store = torch.distributed.HashStore()
    Processes(0, 2, store=store).ends(Died("no checkpoint was written yet"))
    assert isinstance(Processes(1, 2, store=store).last_word(Died()), Elsewhere)


def test_the_first_process_lets_the_one_that_speaks_go_on():
    """That one waits for its word, and torchrun kills it meanwhile where the first has left without one."""
    store = torch.distributed.HashStore()
    found = Processes(0, 2, store=store).last_word(Elsewhere(2, "process 1: the disk is full"))
    assert isinstance(found, Elsewhere) and store.check(["ended/0"])
    assert str(Processes(1, 2, store=store).last_word(UserError("the disk is full"))) == "the disk is full"


def test_a_mistake_of_one_process_is_said_by_it_and_ends_all(launched, monkeypatch, tmp_path):
    opened = build.open_sources

    def elsewhere(data):
        if os.environ["RANK"] == "1":
            raise UserError("the disk of this machine is full; make room")
        return opened(data)

    monkeypatch.setattr(build, "open_sources", elsewhere)
    assert codes(launched(*FOUR)) == [2, 2]
    assert [line for line in lines(tmp_path, 0) if " WARNING " not in line] == []
    assert lines(tmp_path, 1) == ["dpo.train, process 1 of 2: the disk of this machine is full; make room"]


def test_a_mistake_of_all_is_said_once_and_not_again_at_a_restart(launched, tmp_path):
    agent = {"TORCHELASTIC_RUN_ID": str(tmp_path.name), "TORCHELASTIC_MAX_RESTARTS": "1"}
    assert codes(launched(*FOUR, "--effective-batch", "3", **agent)) == [2, 2]
    assert len(lines(tmp_path, 0)) == 1 and "--effective-batch" in lines(tmp_path, 0)[0] and lines(tmp_path, 1) == []
    assert codes(launched(*FOUR, "--effective-batch", "3", TORCHELASTIC_RESTART_COUNT="1", **agent)) == [2, 2]
    assert len(lines(tmp_path, 0)) == 1 and lines(tmp_path, 1) == []


def under_torchrun(start, folder: Path, *words: str) -> subprocess.Popen:
    """`torchrun --nproc-per-node 2 -m dpo.train`; what it writes goes to `said`."""
    own = ["--nproc-per-node", "2", "--master-port", str(free_port()), "--max-restarts", "1", "-m", "dpo.train"]
    flags = [str(word) for word in (*start, *FOUR, *words)]
    launcher = [sys.executable, "-m", "torch.distributed.run", *own, *flags]
    with (folder / "said").open("w") as said:
        return subprocess.Popen(launcher, stdout=said, stderr=said, env=os.environ | {"TMPDIR": str(folder)})


def agent(words: list[str]) -> int:
    """`torchrun --nproc-per-node 2 -m dpo.train words...` but for the start of the interpreters: its agent, and the
    environment that it gives, with forked children."""
    own = ["--nproc-per-node", "2", "--master-port", str(free_port()), "--start-method", "fork", "-m", "dpo.train"]
    config, _, _ = config_from_args(parse_args([*own, *words]))
    return sum(elastic_launch(config, main)(words).values())


def test_torchrun_starts_it(start, tmp_path):
    words = [str(word) for word in (*start, *FOUR, "--steps", "1")]
    assert codes([start_command(words, tmp_path / "said", agent)]) == [0], (tmp_path / "said").read_text("utf-8")
    said = (tmp_path / "said").read_text("utf-8")
    assert "4 pairs an update (1 x 2 x 2 processes)" in said and said.count("step 1/1") == 1
    assert len(updates(tmp_path / "out")) == 1


@pytest.mark.slow
def test_torchrun_restarts_from_the_latest_checkpoint(start, tmp_path):
    """Of torchrun's two children the second is killed; the first alone knows that the run had begun."""
    launcher = under_torchrun(start, tmp_path, "--steps", "40", "--checkpoint-every", "2", "--overwrite")
    wait_for_updates(tmp_path / "out", 5, 300)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, said = launcher.wait(600), (tmp_path / "said").read_text("utf-8")
    assert code == 0, said[-5000:]
    assert "started again by torchrun" in said and "resumed" in said
    assert [record["step"] for record in updates(tmp_path / "out")] == list(range(1, 41))


@pytest.mark.slow
def test_killed_at_ten_moments_a_run_comes_to_the_same_end(start, tmp_path, world):
    """All processes are killed at once, wherever they are; weights at the end are those of a run left alone."""
    rng = random.Random(0)
    flags = [str(word) for word in (*start, *FOUR, "--checkpoint-every", "1", "--steps", "6", "--resume", "latest")]
    (tmp_path / "straight").mkdir()
    assert codes(commands(2, [*flags, "--output", str(tmp_path / "straight")], tmp_path)) == [0, 0]
    for _ in range(10):
        children = commands(2, flags, tmp_path)
        time.sleep(rng.uniform(0.5, 12))
        end(children)
    assert codes(commands(2, flags, tmp_path)) == [0, 0]
    found, expected = (
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("out", "straight")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)

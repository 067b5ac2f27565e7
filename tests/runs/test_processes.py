"""One run on several processes: the same training as on one, whole checkpoints, and one clear end."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from dpo import prepare
from dpo.train import train_step
from dpo.training import validation
from tests.help.processes import together
from tests.help.running import everything, make_run

EXACT = ["--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4", "--seed", "3"]
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

# By name: updates, and the flags of a run. Held-out pairs are dealt out unevenly to 2 and 4 processes.
SETTINGS = {
    "dpo": (2, [*EXACT, *HELD_OUT, "--flip", "--crop", "random", "--caption-dropout", "0.3", "--ema", "0.9"]),
    "lora": (1, [*EXACT, "--lora", "--lora-dropout", "0.3", "--rank", "1", "--checkpointing", "on"]),
    "dde": (2, [*EXACT, "--method", "dde", "--checkpointing", "on"]),
    "recorded": (20, [*EXACT, "--method", "dde", "--reference", "recorded"]),
    "sft": (1, [*EXACT, "--method", "sft"]),
    "single": (1, ["--precision", "fp32", "--optimizer", "adamw8bit"]),
}
LONG = 20  # updates of each in the slow test


@pytest.fixture(scope="module")
def store(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("store") / "store"
    words = [
        "--store",
        str(place),
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--dtype",
        "fp32",
        "--workers",
        "0",
    ]
    assert prepare.main([*words, "--reference", "--precision", "fp64", "--seed", "3"]) == 0
    return str(place)


def made(world, store, folder: Path, name: str, processes=None, updates=None):
    """What a run of SETTINGS[name] on one of the processes comes to: a dict of tensors, numbers and lists."""
    few, flags = SETTINGS[name]
    count = processes.count if processes else 1
    rows = ["--batch-size", "1", "--effective-batch", "4"]
    run = make_run(
        world("sd15"),
        store if name == "recorded" else world("pairs"),
        folder / f"{count}-{name}",
        *rows,
        *flags,
        processes=processes,
    )
    seen, figures, gradients = [], [], []
    batches = run.batches()

    def watched(micro_batches):
        for batch in micro_batches:
            seen.append((batch.position, batch.keys.tolist(), batch.captions))
            yield batch

    update = run.updater.update
    run.updater.update = lambda *args: (
        gradients.append([p.grad.clone() for p in run.updater.parameters]),
        update(*args),
    )
    for _ in range(updates or few):
        figures.append(train_step(run, watched(itertools.islice(batches, run.config.optim.accumulation))))
        run.count()
    batches.close()
    found = validation.accuracy(run.step, run.held_out) if run.held_out else {}
    return {
        "weights": everything(run),
        "figures": figures,
        "seen": seen,
        "gradients": gradients[0],
        "held out": found,
        "passes": run.config.optim.accumulation,
    }


@pytest.fixture(scope="module")
def runs(world, store, tmp_path_factory):
    """All settings on 1, 2 and 4 processes: results by their number, then process, then setting."""
    folder = tmp_path_factory.mktemp("runs")
    world("sd15"), world("pairs")
    found = {1: [{name: made(world, store, folder, name) for name in SETTINGS}]}
    for count in (2, 4):
        found[count] = together(
            count, lambda processes: {name: made(world, store, folder, name, processes) for name in SETTINGS}, folder
        )
    return found


def close(found, expected, tolerance):
    """Whether two figures are the same, number by number; None stands for none."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected, itertools.repeat(tolerance)))
    if expected is None or found is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "single"])
def test_the_number_of_processes_changes_the_order_of_sums_alone(runs, name, count):
    alone = runs[1][0][name]
    for each in runs[count]:
        found = each[name]
        assert found["passes"] * count == alone["passes"]
        for key, value in alone["weights"].items():
            assert (found["weights"][key].double() - value.double()).abs().max() < 1e-10, key
        for theirs, own in zip(found["figures"], alone["figures"], strict=True):
            assert [key for key in own if not close(theirs[key], own[key], 1e-8)] == []
        assert close(found["held out"].get("heldout_interval"), alone["held out"].get("heldout_interval"), 0)
        assert close(found["held out"].get("heldout_difference"), alone["held out"].get("heldout_difference"), 1e-12)
    dealt = sorted(place for each in runs[count] for place in each[name]["seen"])
    assert dealt == alone["seen"]  # pairs, order, dropped captions


@pytest.mark.parametrize("count", [2, 4])
def test_the_first_gradient_in_single_precision(runs, count):
    alone = runs[1][0]["single"]["gradients"]
    size = torch.stack([g.norm() for g in alone]).norm()
    for each in runs[count]:
        found = each["single"]["gradients"]
        apart = torch.stack([(a - b).norm() for a, b in zip(found, alone, strict=True)]).norm()
        assert apart / size < 1e-6
    first, *others = (each["single"]["weights"] for each in runs[count])
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)  # 8-bit states too

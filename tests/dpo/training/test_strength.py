"""dpo.training.strength: beta and KTO's centre follow the updates, and go on from a checkpoint as they were."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo.common.errors import UserError
from dpo.settings.flags import parse
from dpo.training.denoisers import following
from dpo.training.run import Run
from dpo.training.state import snapshot
from dpo.training.strength import Centre, Strength
from tests.help.running import advance, everything, make_run

SOON = ("--target-gradient-factor", "0.2", "--batch-size", "2", "--precision", "fp64", "--eps", "1e-4")


def made(target: float = 0.2, pull: float = 0.5) -> Strength:
    return Strength(torch.tensor(2000.0), 2000.0, target, 2000.0, pull)


def test_it_waits_and_then_follows_the_formula():
    strength, average, beta = made(), 0.5, 2000.0
    for update in range(1, 301):
        factor = 0.4 + 0.1 * math.sin(update)
        strength.after({"gradient_factor": factor})
        average = 0.99 * average + 0.01 * factor
        beta *= math.exp(0.01 * (average - 0.2)) if update >= 100 else 1.0
        assert strength.now == pytest.approx(beta, rel=1e-12) and strength.beta.item() == pytest.approx(beta, rel=1e-6)
    assert beta > 2500
    strength.after({"gradient_factor": None})
    assert strength.updates == 300


@pytest.mark.parametrize(("factor", "end"), [(0.5, 8000.0), (0.0, 500.0)])
def test_it_stays_within_a_quarter_and_four_times_the_start(factor, end):
    strength = made()
    for _ in range(3000):
        strength.after({"gradient_factor": factor})
    assert strength.now == end == strength.beta.item()


def test_labels_that_pull_little_from_the_start_do_not_move_it_down():
    """Where nothing is learned beta grows, as it does with hard labels: the average begins at the labels' own pull."""
    strength = made(0.14, 0.15)
    for _ in range(150):
        strength.after({"gradient_factor": 0.15})
        assert strength.average == pytest.approx(0.15)
    assert strength.now == pytest.approx(2000 * math.exp(51 * 0.01 * 0.01))


@pytest.mark.parametrize(("flags", "pull"), [((), 0.5), (("--label-smoothing", "0.2"), 0.3)])
def test_a_run_begins_with_the_pull_of_its_labels(flags, pull):
    config, _ = parse(["--model", "m", "--data", "d", "--beta", "2000", *SOON, *flags])
    step = SimpleNamespace(beta=torch.tensor(2000.0), kto=None)
    (found,) = following(config, step, SimpleNamespace(prob=np.ones(3, dtype=np.float32), sides=2))
    assert isinstance(found, Strength) and found.average == pytest.approx(pull) and found.target == 0.2


def test_a_changed_beta_moves_it_along():
    """Also the one of a checkpoint of an earlier version, which does not say what it had started from: within the bounds."""
    before = made()
    for _ in range(150):
        before.after({"gradient_factor": 0.5})
    assert before.now > 2000
    saved = before.as_json()
    for start in (2000.0, 5000.0):
        after = Strength(torch.tensor(start), start, 0.2, start, 0.3)
        after.restore(saved)
        assert after.now == pytest.approx(before.now * start / 2000, rel=1e-12) and after.beta.item() == pytest.approx(
            after.now
        )
        assert (after.average, after.updates) == (before.average, before.updates)
    del saved["start"]
    after.restore(saved)
    assert after.now == before.now


def test_the_factor_comes_to_its_target_where_the_margin_grows_with_beta():
    strength, advantage = made(), 1.0 / 2000  # z = beta times this: sigmoid(-1) = 0.27 at the start
    for _ in range(6000):
        strength.after({"gradient_factor": 1 / (1 + math.exp(strength.now * advantage))})
    assert 1 / (1 + math.exp(strength.now * advantage)) == pytest.approx(0.2, abs=1e-3)


def started(world, folder, *flags: str, updates: int = 99) -> Run:
    run = make_run(world("sd15"), world("pairs"), folder, *SOON, *flags)
    if not run.done:
        run.following[0].updates = updates  # as if so many were made
    return run


@pytest.mark.long
def test_a_run_moves_beta_and_resumes_exactly(world, tmp_path):
    straight = started(world, tmp_path)
    first = advance(straight, 2)
    snapshot(straight)
    second = started(world, tmp_path, "--resume", "latest")
    assert second.following == straight.following and second.step.beta == straight.step.beta
    later = [advance(run, 2) for run in (straight, second)]
    betas = [figures["beta"] for figures in first + later[0]]
    assert betas[0] == 2000.0 < betas[1] < betas[2] < betas[3] and [f["beta"] for f in later[1]] == betas[2:]
    ours, other = everything(straight), everything(second)
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def test_a_target_that_labels_do_not_reach_is_refused_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.training.build.load_model", None)
    with pytest.raises(UserError, match="--target-gradient-factor 0.2 is not below 0.15, the mean"):
        make_run(world("sd15"), world("pairs"), tmp_path, *SOON, "--label-smoothing", "0.35")


@pytest.mark.long
def test_a_checkpoint_keeps_its_average(world, tmp_path):
    before = started(world, tmp_path, "--label-smoothing", "0.1")
    assert before.following[0].average == pytest.approx(0.4)
    before.following[0].average = 0.37
    snapshot(before)
    after = started(world, tmp_path, "--label-smoothing", "0.35", "--resume", "latest")
    assert after.following[0].average == 0.37


@pytest.mark.long
def test_the_cut_of_an_update_does_not_move_it(world, tmp_path):
    flags = ("--accumulation", "2", "--batch-size", "1")
    runs = [started(world, tmp_path / "whole"), started(world, tmp_path / "cut", *flags)]
    whole, cut = ([figures["beta"] for figures in advance(run, 3)] for run in runs)
    assert whole == pytest.approx(cut, rel=1e-12) and whole[2] > whole[0]


@pytest.mark.parametrize(
    ("win", "lose", "more", "gain"),
    [
        (-0.2, -0.1, {}, 0.15),  # pairs: as many of both
        (-0.2, -0.1, {"disliked_images": 1}, 0.175),  # images alone, of four
        (-0.2, None, {}, 0.2),
        (None, -0.1, {"disliked_images": 4}, 0.1),
        (0.3, -0.1, {"disliked_images": 1}, 0.0),  # never below 0
        (None, None, {}, 0.7),  # an update without any says nothing
    ],
)
def test_the_centre_is_the_mean_gain_of_all_images(win, lose, more, gain):
    centre = Centre(torch.zeros(()), 1000.0, 0.7)
    centre.after({"win_error_vs_reference": win, "lose_error_vs_reference": lose, "pairs": 4, **more})
    assert centre.gain == pytest.approx(gain)
    assert centre.center.item() == pytest.approx(1000 * gain if win or lose else 0.0)


def test_without_a_target_there_is_none(world, tmp_path):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2")
    assert run.following == [] and "beta" not in advance(run, 1)[0]


# With little weight on what is not liked most images gain, so that the centre is not always 0.
KTO = ("--method", "kto", "--precision", "fp64", "--eps", "1e-4", "--seed", "3", "--kto-disliked-weight", "0.1")


@pytest.mark.long
def test_ktos_centre_is_that_of_the_update_before_however_it_is_cut_and_resumes_exactly(world, tmp_path):
    straight = make_run(world("sd15"), world("pairs"), tmp_path / "run", *KTO, "--batch-size", "2")
    assert straight.step.beta == 2000.0  # of the kernel, whose logit has a 1/2
    first = advance(straight, 2)
    snapshot(straight)
    resumed = make_run(world("sd15"), world("pairs"), tmp_path / "run", *KTO, "--batch-size", "2", "--resume", "latest")
    cut = make_run(world("sd15"), world("pairs"), tmp_path / "cut", *KTO, "--batch-size", "1", "--accumulation", "2")
    figures = first + advance(straight, 2)
    assert figures[0]["loss"] == pytest.approx((0.5 + 0.1 * 0.5) / 2) and figures[0]["kto_center"] == 0.0
    for before, after in itertools.pairwise(figures):
        gain = -(before["win_error_vs_reference"] + before["lose_error_vs_reference"]) / 2
        assert after["kto_center"] == pytest.approx(1000 * max(gain, 0.0), rel=1e-12)
    assert any(one["kto_center"] > 0 for one in figures)
    assert [one["kto_center"] for one in advance(resumed, 2)] == [one["kto_center"] for one in figures[2:]]
    ours, other = everything(straight), everything(resumed)
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    for one, two in zip(figures, advance(cut, 4), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
        assert one["kto_center"] == pytest.approx(two["kto_center"], rel=1e-7, abs=1e-12)

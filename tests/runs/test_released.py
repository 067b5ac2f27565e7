"""Gradient release in a run: the same run without clipping, and what a figure that is not finite then means."""

import math

import pytest
import torch

from dpo.training import checkpoint
from dpo.training.run import Diverged
from dpo.training.state import snapshot
from tests.help.running import advance, everything, make_run

FLAGS = ["--batch-size", "4", "--steps", "3", "--optimizer", "adamw8bit", "--checkpointing", "on"]


def released(world, output, *flags):
    return make_run(world("sd15"), world("pairs"), output, *FLAGS, "--gradient-release", *flags)


def test_without_clipping_the_run_is_the_same(world, tmp_path):
    flags = ["--max-grad-norm", "0", "--method", "dde"]
    ordinary = make_run(world("sd15"), world("pairs"), tmp_path / "a", *FLAGS, *flags)
    inside = released(world, tmp_path / "b", *flags)
    figures = [advance(run, 2) for run in (ordinary, inside)]
    assert figures[0] == figures[1] and all(f["grad_norm"] > 0 for f in figures[0])
    expected, found = everything(ordinary), everything(inside)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.fixture
def run(world, tmp_path):
    """A run with gradient release after its first update."""
    run = released(world, tmp_path / "run")
    advance(run, 1)
    return run


def test_a_loss_that_is_not_finite_ends_the_run_with_its_state_whole(run):
    before = everything(run)
    run.step.beta.fill_(math.nan)
    with pytest.raises(Diverged, match=r"update 2 gave a loss .*; the state before it is saved"):
        advance(run, 1)
    assert run.whole
    after = everything(run)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert checkpoint.load(snapshot(run)).state["norm_before"] == run.updater.release.before.item() > 0


def test_a_gradient_that_is_not_finite_is_said_and_the_run_goes_on(run, caplog):
    weight = run.updater.parameters[5]
    hook, before = weight.register_hook(lambda grad: grad * math.nan), weight.detach().clone()
    (figures,) = advance(run, 1)
    assert figures["grad_norm"] is None and torch.equal(weight, before)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said[-1].startswith(
        f"update 2: the gradient of 1 of {len(run.updater.parameters)} parameters was not finite"
    )
    hook.remove()
    assert advance(run, 1)[0]["grad_norm"] > 0 and not torch.equal(weight, before)


def test_where_no_gradient_is_finite_the_run_ends(run):
    for weight in run.updater.parameters:
        weight.register_hook(lambda grad: grad * math.nan)
    before = [p.detach().clone() for p in run.updater.parameters]
    with pytest.raises(Diverged, match="none in the loss, only in the gradient"):
        advance(run, 1)
    assert all(torch.equal(p, old) for p, old in zip(run.updater.parameters, before, strict=True))
    assert not run.whole, "the optimizer has counted an update that the weights did not get"


def test_weights_between_two_updates_are_not_saved(run, monkeypatch):
    """Inside backward some weights are updated and others not."""
    monkeypatch.setattr(run.updater.optimizer, "step_one", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        advance(run, 1)
    assert not run.whole

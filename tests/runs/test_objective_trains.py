"""What objective.py says is what training runs: broken there, the losses and the weights of a run change."""

import torch

from dpo import objective
from tests.help.running import advance, make_run, weights

FLAGS = ("--batch-size", "2", "--learning-rate", "1e-4")


def three_updates(world, output, *flags):
    run = make_run(world("sd15"), world("pairs"), output, *FLAGS, *flags)
    return [figures["loss"] for figures in advance(run, 3)], weights(run)


def test_a_broken_shape_changes_losses_and_weights(world, tmp_path, monkeypatch):
    losses, policy = three_updates(world, tmp_path / "as it is")
    sigmoid = objective.SHAPES["sigmoid"]
    broken = objective.Shape(lambda z, p: 2 * sigmoid.loss(z, p) + 0.1 * z, None)
    monkeypatch.setitem(objective.SHAPES, "sigmoid", broken)
    other_losses, other = three_updates(world, tmp_path / "broken")
    assert all(a != b for a, b in zip(losses, other_losses))
    assert any(not torch.equal(value, other[name]) for name, value in policy.items())


def test_a_new_shape_needs_no_other_line(world, tmp_path, monkeypatch):
    """A run uses a shape that is added to objective.SHAPES alone: no other code lists the shapes."""
    monkeypatch.setitem(
        objective.SHAPES, "exponential", objective.Shape(lambda z, p: p * torch.exp(-z) + (1 - p) * torch.exp(z))
    )
    run = make_run(world("sd15"), world("pairs"), tmp_path, *FLAGS)
    run.step.shape = "exponential"
    losses = [figures["loss"] for figures in advance(run, 3)]
    assert losses[0] == 1.0 and losses[1] != 1.0  # e^0 at step 0


def test_what_is_counted_as_accuracy_is_defined_once(world, tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "implicit_accuracy", lambda d: torch.full_like(d, 0.25))
    run = make_run(world("sd15"), world("pairs"), tmp_path, *FLAGS)
    assert advance(run, 1)[0]["implicit_accuracy"] == 0.25

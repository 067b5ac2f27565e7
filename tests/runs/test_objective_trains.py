"""What objective.py says is what training runs: broken there, the losses and the weights of a run change."""

import pytest
import torch

from dpo import objective
from tests.help.running import advance, make_run, weights

FLAGS = ("--batch-size", "2", "--learning-rate", "1e-4")


def three_updates(world, output, *flags):
    run = make_run(world("sd15"), world("pairs"), output, *FLAGS, *flags)
    return [figures["loss"] for figures in advance(run, 3)], weights(run)


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], pytest.param(["--lora"], marks=pytest.mark.slow)], ids=["full", "lora"])
def test_mapo_trains_without_a_reference_however_its_batch_is_cut(world, tmp_path, flags):
    found = []
    for size, passes in (("4", "1"), ("2", "2")):
        more = [*flags, "--precision", "fp64", "--eps", "1e-4", "--batch-size", size, "--accumulation", passes]
        run = make_run(world("sd15"), world("pairs"), tmp_path / size, "--method", "mapo", *more)
        assert run.step.reference is None and run.step.odds == objective.Odds(0.1, 0.5)
        figures = advance(run, 2)
        found.append((weights(run), figures))
        for name in ("implicit_accuracy", "margin_mean", "reference_win_error", "gradient_factor"):
            assert figures[0][name] is None
    (one, whole), (other, cut) = found
    assert all(torch.allclose(value, other[name], rtol=1e-9, atol=1e-12) for name, value in one.items())
    assert whole[1]["loss"] == pytest.approx(cut[1]["loss"], rel=1e-9) and whole[0]["policy_lose_error"] > 0


@pytest.mark.long
def test_the_size_of_predictions_is_measured_and_held_back(world, tmp_path):
    """The ratio is exactly 1 at step 0; pushed up by large steps, it is smaller with the penalty."""
    ratios = []
    for weight in ("0", "100"):
        flags = ["--batch-size", "2", "--learning-rate", "1e-3", "--norm-penalty", weight]
        figures = advance(make_run(world("sd15"), world("pairs"), tmp_path / weight, *flags), 5)
        assert figures[0]["prediction_norm_ratio"] == 1.0 and figures[0]["loss"] == pytest.approx(0.6931472, abs=1e-7)
        ratios.append(figures[-1]["prediction_norm_ratio"])
    assert ratios[0] != 1.0 and ratios[1] < ratios[0]

"""dpo.optimizer: learning rates, the mean over usable pairs, clipping, loss scaling, averaged weights, fallbacks."""

import contextlib
import importlib.util
import logging
import math

import pytest
import torch

from dpo.common.errors import UserError
from dpo.settings.config import Config, change
from dpo.training import build as building
from dpo.training.optimizer import (
    Updater,
    accumulate_in_fp32,
    averaging_decay,
    build,
    check_installed,
    learning_rate,
)


def lr(step: int, scheduler: str = "constant", **options) -> float:
    return learning_rate(step, **{"peak": 1e-4, "warmup": 10, "steps": 110, "scheduler": scheduler, **options})


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_starts_above_zero(scheduler):
    assert [lr(step, scheduler) for step in range(10)] == pytest.approx([1e-5 * (step + 1) for step in range(10)])
    assert lr(10, scheduler) == 1e-4
    assert lr(0, scheduler, warmup=0) == 1e-4


def test_schedules_after_the_warm_up():
    assert {lr(step) for step in range(10, 500)} == {1e-4}
    assert lr(60, "linear") == pytest.approx(0.5e-4) and lr(85, "linear") == pytest.approx(0.25e-4)
    assert lr(35, "cosine") == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi / 4))) and lr(
        60, "cosine"
    ) == pytest.approx(0.5e-4)
    for scheduler in ("linear", "cosine"):
        values = [lr(step, scheduler) for step in range(10, 111)]
        assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(0, abs=1e-20)
        assert lr(500, scheduler) == pytest.approx(0, abs=1e-20)  # a run made longer does not turn negative
    assert lr(5, "cosine", steps=5, warmup=5) == 1e-4  # nothing after the warm-up: no division by zero


@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_a_warm_up_from_zero_is_that_of_diffusers(ours, theirs, warmup):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=110)
    expected = []
    for _ in range(110):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = [lr(step, ours, warmup=warmup, start="zero") for step in range(110)]
    assert found == pytest.approx(expected, rel=1e-12) and found[0] == (0.0 if warmup else 1e-4)


def test_unknown_schedule():
    with pytest.raises(KeyError):
        lr(50, "polynomial")


# --- updates --------------------------------------------------------------------------------------------------------


def updater(*, max_grad_norm: float = 0.0, kind: str = "sgd", **options) -> Updater:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(40, 30)), torch.nn.Parameter(torch.randn(17))]
    made = torch.optim.SGD(weights, lr=1.0) if kind == "sgd" else adam(kind, weights)
    return Updater(["a", "b"], weights, made, max_grad_norm, **options)


def adam(kind: str, weights: list) -> torch.optim.Optimizer:
    return build(kind, weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


def give_gradients(target: Updater, factor: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for parameter in target.parameters:
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)
    return [parameter.grad.clone() for parameter in target.parameters]


def norm_of(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def test_update_takes_the_given_learning_rate_and_drops_gradients():
    made = updater()
    before = [p.detach().clone() for p in made.parameters]
    gradients = give_gradients(made)
    norm = made.grad_norm(1.0)
    assert isinstance(norm, torch.Tensor) and norm.item() == pytest.approx(norm_of(gradients), rel=1e-6)
    made.update(0.01, norm)
    for parameter, old, gradient in zip(made.parameters, before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.01 * gradient)
        assert parameter.grad is None


@pytest.mark.parametrize(("limit", "clipped"), [(1.0, True), (1e6, False), (0.0, False)])
def test_clipping(limit, clipped):
    made = updater(max_grad_norm=limit)
    before = [p.detach().clone() for p in made.parameters]
    gradients = give_gradients(made)
    norm = made.grad_norm(1.0)
    made.update(1.0, norm)
    moved = [old - p.detach() for p, old in zip(made.parameters, before, strict=True)]
    assert norm_of(moved) == pytest.approx(limit if clipped else norm_of(gradients), rel=1e-5)
    ratio = norm_of(moved) / norm_of(gradients)
    for step, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(step, ratio * gradient, rtol=1e-4, atol=1e-6)  # direction kept
    assert norm.item() == pytest.approx(norm_of(gradients), rel=1e-6)  # what is reported is the norm before clipping


def test_share_turns_the_sum_into_the_mean_over_usable_pairs():
    """Gradients come divided by the nominal batch of 8; 6 pairs were usable."""
    made = updater()
    per_pair = torch.Generator().manual_seed(2)
    pairs = [torch.randn(40, 30, generator=per_pair) for _ in range(6)]
    made.parameters[0].grad = sum(pairs) / 8
    made.grad_norm(6 / 8)
    torch.testing.assert_close(made.parameters[0].grad, sum(pairs) / 6)
    before = made.parameters[0].grad.clone()
    made.grad_norm(1.0)
    assert torch.equal(made.parameters[0].grad, before)


def test_norm_is_taken_after_the_share_and_before_clipping():
    made = updater(max_grad_norm=1.0)
    gradients = give_gradients(made)
    assert made.grad_norm(0.5).item() == pytest.approx(2 * norm_of(gradients), rel=1e-6)


def test_drop_forgets_a_step_in_progress():
    made = updater()
    give_gradients(made)
    made.drop()
    assert all(p.grad is None for p in made.parameters)


def test_parameters_without_a_gradient_are_left_alone():
    made = updater(max_grad_norm=1.0)
    made.parameters[1].grad = torch.ones(17)
    before = made.parameters[0].detach().clone()
    made.update(0.1, made.grad_norm(1.0))
    assert torch.equal(made.parameters[0].detach(), before)


@pytest.mark.parametrize("wide", [False, True])
def test_the_gradients_of_bf16_weights_are_summed_in_fp32(wide):
    """64 micro-batches beside the float64 sum of the same gradients: in bf16 the sum is off by 0.8 %."""
    weight = torch.nn.Parameter(torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert not wide or accumulate_in_fp32([weight]) == 4 * weight.numel()
    made = Updater(["w"], [weight], adam("adamw8bit", [weight]), 1.0)
    exact = torch.zeros(40, 60, dtype=torch.float64)
    for step in range(64):
        gradient = (0.02 + 0.01 * torch.randn(40, 60, generator=torch.Generator().manual_seed(step))).bfloat16()
        exact += gradient.double()
        made.backward((weight * gradient).sum())
    error = ((weight.grad.double() - exact).norm() / exact.norm()).item()
    assert error < 1e-6 if wide else error > 5e-3, error
    norm = made.grad_norm(0.5)
    assert norm.item() == pytest.approx(2 * exact.norm().item(), rel=1e-6 if wide else 0.1)
    before = weight.detach().clone()
    made.update(1e-2, norm)
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before) and weight.grad is None


def test_gradients_of_fp32_weights_stay_as_they_are():
    weight = torch.nn.Parameter(torch.zeros(3))
    assert accumulate_in_fp32([weight]) == 0 and weight.grad_dtype == torch.float32


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_averaged_weights():
    made = updater(ema_decay=0.9)
    expected = [p.detach().clone() for p in made.parameters]
    start = [p.detach().clone() for p in made.parameters]
    for done in (0, 1, 8, 200):  # decay 1/10, 2/11, 1/2, and 0.9 from update 80 on
        give_gradients(made, 0.1)
        made.update(0.5, made.grad_norm(1.0), done)
        decay = min(0.9, (1 + done) / (10 + done))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, made.parameters, strict=True)]
    for average, value, first, parameter in zip(made.ema, expected, start, made.parameters, strict=True):
        torch.testing.assert_close(average, value)
        assert not torch.equal(average, first) and not torch.equal(average, parameter.detach())
        assert not average.requires_grad


def test_the_start_is_forgotten():
    """What a short run began with has no weight in the average of a large decay: 0.9999 ** 2000 is 82 %."""
    assert math.prod(averaging_decay(0.9999, done) for done in range(2000)) < 1e-20
    assert averaging_decay(0.9999, 10**6) == 0.9999 and averaging_decay(0.0, 50) == 0.0


@pytest.mark.parametrize("failing", [False, True])
def test_averaged_weights_change_places_with_those_in_training(failing):
    made = updater(ema_decay=0.9)
    give_gradients(made)
    made.update(0.5, made.grad_norm(1.0), 100)
    made.parameters[1].data = made.parameters[1].data.bfloat16()  # as in bf16-pure
    live, averages = [p.data for p in made.parameters], [e.clone() for e in made.ema]
    with contextlib.suppress(ZeroDivisionError), made.averaged():
        assert torch.equal(made.parameters[0], made.ema[0]) and made.parameters[0].data_ptr() == made.ema[0].data_ptr()
        assert torch.equal(made.parameters[1], made.ema[1].bfloat16())
        assert not torch.equal(made.parameters[0], live[0])
        1 / (not failing)
    assert all(p.data_ptr() == value.data_ptr() for p, value in zip(made.parameters, live, strict=True))
    assert all(torch.equal(e, value) for e, value in zip(made.ema, averages, strict=True))


def test_without_an_average_nothing_changes_places():
    made = updater()
    with made.averaged():
        assert torch.equal(made.parameters[0], updater().parameters[0])


def test_no_average_when_off():
    assert updater().ema == []


# --- loss scaling ------------------------------------------------------------------------------------------------------


def scaled_updater(scale: float) -> Updater:
    return updater(max_grad_norm=1.0, scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


def test_scaled_loss_gives_the_same_update_as_without():
    plain, scaled = updater(max_grad_norm=1.0), scaled_updater(1024.0)
    for made in (plain, scaled):
        loss = sum((p * p).sum() for p in made.parameters)
        made.backward(loss)
        if made is scaled:
            torch.testing.assert_close(made.parameters[0].grad, 1024 * 2 * made.parameters[0].detach())
        norm = made.grad_norm(0.5)
        made.update(0.1, norm)
        assert norm.item() == pytest.approx(2 * 2 * norm_of([p.detach() for p in updater().parameters]), rel=1e-4)
    for one, two in zip(plain.parameters, scaled.parameters, strict=True):
        torch.testing.assert_close(one, two)


def test_overflow_skips_the_step_and_lowers_the_scale():
    made = scaled_updater(1024.0)
    before = [p.detach().clone() for p in made.parameters]
    give_gradients(made)
    made.parameters[0].grad[0, 0] = math.inf
    made.scaler.scale(torch.zeros(()))  # the scaler must have scaled something in this step
    norm = made.grad_norm(1.0)
    made.update(0.1, norm)
    assert not math.isfinite(norm.item())
    assert all(torch.equal(p.detach(), old) for p, old in zip(made.parameters, before, strict=True))
    assert made.scaler.get_scale() == 512.0 and made.parameters[0].grad is None
    give_gradients(made)
    made.scaler.scale(torch.zeros(()))
    made.update(0.1, made.grad_norm(1.0))
    assert not torch.equal(made.parameters[0].detach(), before[0])


# --- optimizers by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "bnb-adamw8bit", "paged-adamw8bit", "lion8bit", "adafactor"])
def test_every_optimizer_lowers_a_loss(kind):
    made = updater(kind=kind)
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(3))
    truth = torch.randn(40, 30, generator=torch.Generator().manual_seed(4))

    def loss():
        return (x @ made.parameters[0] - x @ truth).square().mean() + made.parameters[1].square().mean()

    first = loss().item()
    for _ in range(30):
        loss().backward()
        made.update(1e-2, made.grad_norm(1.0))
    assert loss().item() < 0.95 * first


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion8bit", "adafactor"])
def test_learning_rate_of_the_update_wins_over_that_of_the_build(kind):
    still, moving = updater(kind=kind), updater(kind=kind)
    before = still.parameters[0].detach().clone()
    for made, rate in ((still, 0.0), (moving, 1e-2)):
        give_gradients(made)
        made.update(rate, made.grad_norm(1.0))
    assert torch.equal(still.parameters[0].detach(), before)
    assert not torch.equal(moving.parameters[0].detach(), before)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion8bit", "adafactor"])
def test_weight_decay_reaches_the_optimizer(kind):
    ends = []
    for decay in (0.0, 0.5):
        weight = torch.nn.Parameter(torch.full((64, 80), 2.0))
        made = build(kind, [weight], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        weight.grad = torch.ones_like(weight)
        made.step()
        ends.append(weight.detach().mean().item())
    assert ends[1] == pytest.approx(ends[0] - 0.1 * 0.5 * 2.0, rel=0.05) or (ends[0] - ends[1]) > 0.05


def test_adamw_is_adamw():
    one, two = updater(kind="adamw"), updater(kind="adamw")
    two.optimizer = torch.optim.AdamW(two.parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for made in (one, two):
        for _ in range(3):
            give_gradients(made)
            made.update(1e-3, made.grad_norm(1.0))
    torch.testing.assert_close(one.parameters[0], two.parameters[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["bnb-adamw8bit", "paged-adamw8bit", "lion8bit"])
def test_a_missing_bitsandbytes_is_said_before_anything_is_loaded(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(building, "open_sources", None)
    with pytest.raises(
        UserError, match=rf"^--optimizer {kind} needs the package bitsandbytes, which is not installed:"
    ):
        building.build(change(Config(), output=str(tmp_path / "run"), optimizer=kind), [])
    check_installed("adamw8bit")


def test_paged_optimizer_on_the_cpu_says_that_it_is_not_paged(caplog):
    with caplog.at_level(logging.WARNING, "dpo"):
        made = updater(kind="paged-adamw8bit")
    (record,) = caplog.records
    assert "on the CPU it is plain bnb-adamw8bit" in record.getMessage()
    assert type(made.optimizer).__name__ == "AdamW8bit"
    caplog.clear()
    updater(kind="bnb-adamw8bit")
    assert caplog.records == []


def test_unknown_optimizer():
    with pytest.raises(KeyError):
        updater(kind="sgd-of-tomorrow")

"""dpo.training.metrics: what is counted, what is not, and that the cut into micro-batches is invisible."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.objective import SHAPES
from dpo.pages.figures import DECILES
from dpo.training.metrics import StepMetrics, peak_memory_gib, summarise, table_by_decile
from tests.help.oracle import pair_terms


def step(count=64, seed=0, dtype=torch.float32):
    """Errors [4, B], timesteps, prob, usable of one made-up step."""
    generator = torch.Generator().manual_seed(seed)
    errors = 0.1 + 0.01 * torch.rand(4, count, generator=generator, dtype=torch.float64)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    usable = (torch.rand(count, generator=generator) > 0.2).to(dtype)
    return errors.to(dtype), timesteps, torch.ones(count, dtype=dtype), usable


def terms_of(errors, timesteps, prob, beta=2000.0, shape="sigmoid"):
    weight, correction = torch.ones(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    return pair_terms(errors, timesteps, prob, weight, correction, beta, shape)


def figures_of(errors, timesteps, prob, usable, split):
    metrics = StepMetrics(1000)
    for e, t, p, u in zip(errors.split(split, 1), timesteps.split(split), prob.split(split), usable.split(split)):
        metrics.add(terms_of(e, t, p), p, u)
    return metrics.read()


def test_images_without_partners_are_on_the_side_of_their_label():
    errors, t, _, usable = step(dtype=torch.float64)
    prob = torch.where(torch.arange(64) % 4 == 0, 0.0, 1.0).double()
    liked, nan = prob > 0.5, torch.tensor(torch.nan).double()
    sided = torch.stack([torch.where(side, errors[row], nan) for row in (0, 2) for side in (liked, ~liked)])
    terms = terms_of(errors, t, torch.ones(64).double())._replace(errors=sided)
    metrics = StepMetrics(1000)
    metrics.add(terms, prob, usable)
    figures, kept = metrics.read(), usable.bool()
    for name, side in (("win", liked), ("lose", ~liked)):
        policy, reference = errors[0, kept & side], errors[2, kept & side]
        assert figures[f"policy_{name}_error"] == pytest.approx(policy.mean().item())
        assert figures[f"{name}_error_vs_reference"] == pytest.approx((policy - reference).mean().item())
    assert figures["disliked_images"] == int((kept & ~liked).sum()) > 0 and figures["tied_pairs"] == 0
    assert figures["implicit_accuracy"] == pytest.approx(terms.accuracy[kept].mean().item())
    metrics.add(terms, torch.ones(64).double(), usable * liked)  # liked ones alone
    figures = metrics.read()
    assert "disliked_images" not in figures and figures["lose_error_vs_reference"] is None
    assert figures["win_error_vs_reference"] == pytest.approx((errors[0] - errors[2])[kept & liked].mean().item())


def test_figures_are_those_of_the_definition():
    errors, t, prob, usable = step(dtype=torch.float64)
    figures = figures_of(errors, t, prob, usable, 64)
    kept = usable.bool()
    pw, pl, rw, rl = errors[:, kept].numpy()
    d = (pw - rw) - (pl - rl)
    z = -1000.0 * d
    assert figures["pairs"] == int(kept.sum()) < 64 and figures["unusable_pairs"] == 64 - int(kept.sum())
    assert figures["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-z))), rel=1e-12)
    assert figures["implicit_accuracy"] == pytest.approx(np.mean(d < 0))
    assert figures["margin_mean"] == pytest.approx(z.mean())
    assert [figures[f"margin_p{q}"] for q in (10, 50, 90)] == pytest.approx(list(np.percentile(z, (10, 50, 90))))
    assert figures["gradient_factor"] == pytest.approx(np.mean(1 / (1 + np.exp(z))))
    assert figures["win_error_vs_reference"] == pytest.approx((pw - rw).mean())
    assert figures["lose_error_vs_reference"] == pytest.approx((pl - rl).mean())
    assert figures["reference_lose_error"] == pytest.approx(rl.mean())
    deciles = t[kept].numpy() // 100
    for index in range(DECILES):
        inside = deciles == index
        assert figures["pairs_by_decile"][index] == inside.sum()
        assert figures["accuracy_by_decile"][index] == pytest.approx((d[inside] < 0).mean())
        assert figures["margin_by_decile"][index] == pytest.approx(z[inside].mean())


@pytest.mark.parametrize("split", [1, 7, 16, 64])
def test_cut_into_micro_batches_changes_nothing(split):
    data = step()
    assert figures_of(*data, split) == figures_of(*data, 64)


def test_holes_count_nowhere_even_when_they_hold_nan():
    errors, t, prob, usable = step()
    spoiled = errors.clone()
    spoiled[:, usable == 0] = math.nan
    assert figures_of(spoiled, t, prob, usable, 8) == figures_of(errors, t, prob, usable, 8)


def test_step_zero_reads_ln2_half_and_zero():
    errors, t, prob, usable = step()
    errors = errors[:2].repeat(2, 1)
    figures = figures_of(errors, t, prob, usable, 16)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures["implicit_accuracy"] == 0.5 and figures["margin_mean"] == 0.0 and figures["gradient_factor"] == 0.5
    assert figures["win_error_vs_reference"] == 0.0 == figures["margin_p90"]


def test_empty_decile_and_empty_step_are_none():
    errors, _, prob, usable = step()
    t = torch.full((64,), 999)
    figures = figures_of(errors, t, prob, usable, 64)
    assert figures["accuracy_by_decile"][:9] == [None] * 9 and figures["accuracy_by_decile"][9] is not None
    empty = figures_of(errors, t, prob, torch.zeros_like(usable), 64)
    assert empty["pairs"] == 0 and empty["loss"] is None and empty["margin_p50"] is None
    json.dumps(empty, allow_nan=False)


def test_method_without_reference_has_no_margin():
    errors, t, prob, usable = step()
    errors[2:] = math.nan
    figures = figures_of(errors, t, prob, usable, 64)
    assert figures["margin_mean"] is None and figures["win_error_vs_reference"] is None
    assert figures["policy_win_error"] == pytest.approx(errors[0][usable > 0].double().mean().item())


def test_deciles_are_tenths_of_the_models_own_schedule():
    errors, t, prob, usable = step()
    terms = terms_of(errors, t, prob)
    metrics = StepMetrics(500)
    metrics.add(terms._replace(timesteps=terms.timesteps // 2), prob, usable)
    figures, whole = metrics.read(), figures_of(errors, t, prob, usable, 64)
    assert figures["pairs_by_decile"] == whole["pairs_by_decile"] and min(figures["pairs_by_decile"][5:]) > 0
    assert figures["margin_by_decile"] == whole["margin_by_decile"]


def test_extreme_margins_do_not_overflow():
    errors, t, prob, usable = step()
    metrics = StepMetrics(1000)
    metrics.add(terms_of(errors, t, prob, beta=1e12), prob, usable)
    with np.errstate(over="raise", invalid="raise"):
        assert 0 < metrics.read()["gradient_factor"] < 1


def test_ties_are_counted_and_are_in_no_share_of_pairs():
    errors, t, prob, _ = step()
    usable = torch.ones(64)
    rest = figures_of(errors[:, 10:], t[10:], prob[10:], usable[10:], 16)
    prob[:10] = 0.5
    figures = figures_of(errors, t, prob, usable, 16)
    assert figures["tied_pairs"] == 10 and figures["pairs"] == 64
    for name in ("implicit_accuracy", "accuracy_by_decile", "gradient_factor"):
        assert figures[name] == pytest.approx(rest[name])
    ties_alone = figures_of(errors, t, torch.full((64,), 0.5), usable, 16)
    assert ties_alone["implicit_accuracy"] is None and ties_alone["loss"] is not None


def test_the_gradient_factor_is_the_slope_of_the_loss_that_trains():
    errors, t, _, usable = step()
    prob = torch.full((64,), 0.9)
    metrics = StepMetrics(1000)
    for shape in SHAPES:
        terms = terms_of(errors, t, prob, shape=shape)
        metrics.add(terms, prob, usable)
        live = usable > 0
        z = terms.logit[live].double().requires_grad_()
        more = [-1000.0 * (errors[0] - errors[2] + errors[1] - errors[3])[live].double()] if SHAPES[shape].sides else []
        (expected,) = torch.autograd.grad(SHAPES[shape].loss(z, prob[live].double(), *more).sum(), z)
        assert metrics.read()["gradient_factor"] == pytest.approx(expected.abs().mean().item(), rel=1e-5)
    metrics.add(terms_of(errors, t, prob, shape=None), prob, usable)
    assert metrics.read()["gradient_factor"] is None


def test_scalars_and_tables_travel_along():
    errors, t, prob, usable = step()
    metrics = StepMetrics(1000)
    metrics.add(terms_of(errors, t, prob), prob, usable)
    figures = metrics.read(
        {"grad_norm": torch.tensor(2.5)}, {"table": torch.arange(1000.0), "correction": torch.zeros(1000)}
    )
    assert figures["grad_norm"] == 2.5
    assert figures["table_by_decile"] == pytest.approx([49.5 + 100 * i for i in range(10)])
    assert figures["correction_by_decile"] == [0.0] * 10


def test_one_transfer_a_step_and_none_in_a_micro_batch(monkeypatch):
    calls = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def record(self, *args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, record)
    errors, t, prob, usable = step()
    terms = terms_of(errors, t, prob)
    metrics = StepMetrics(1000)
    calls.clear()
    metrics.add(terms, prob, usable)
    metrics.add(terms, prob, usable)
    assert calls == []
    metrics.read({"grad_norm": torch.tensor(1.0)})
    assert calls.count("cpu") == 1


def test_rows_of_two_processes_concatenate():
    errors, t, prob, usable = step()
    halves = []
    for part in (slice(0, 32), slice(32, 64)):
        metrics = StepMetrics(1000)
        metrics.add(terms_of(errors[:, part], t[part], prob[part]), prob[part], usable[part])
        halves.append(metrics.take())
    assert summarise(torch.cat(halves, 1), 1000) == figures_of(errors, t, prob, usable, 64)


def test_no_gradient_graph_is_kept():
    errors, t, prob, usable = step()
    metrics = StepMetrics(1000)
    metrics.add(terms_of(errors.requires_grad_(), t, prob), prob, usable)
    assert not metrics.take().requires_grad


def test_table_of_a_short_chain():
    assert table_by_decile(torch.arange(4.0))[-1] == 3.0


def test_memory_of_the_process():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert peak_memory_gib(torch.device("cpu")) > 0.5 * resident

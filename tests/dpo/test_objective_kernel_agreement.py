"""The fused op and the objective behind it say what an independent form says: the same fields, the same gradient, in
float64 and float32.
"""

import pytest
import torch

from csrc_triton.pair_errors import pair_errors
from dpo.credit import tables
from dpo.methods import METHODS
from dpo.objective import SHAPES
from dpo.schedule import from_scheduler
from tests.dpo.test_objective import CASES, GOLDEN, SD15, array, ours, target_of
from tests.help.oracle import pair_difference, pair_terms, sample_errors, terms_of

PAIRS, SHAPE = 5, (4, 6, 7)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Predictions a little apart, hard and soft labels, one tie."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2 * PAIRS, *SHAPE, generator=generator, dtype=torch.float64)
    reference = target + 0.3 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    policy = reference + 0.003 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    policy[1], policy[1 + PAIRS] = reference[1], reference[1 + PAIRS]  # one pair untouched
    return {
        "policy": policy.to(dtype),
        "reference": reference.to(dtype),
        "target": target.to(dtype),
        "t": torch.tensor([3, 250, 500, 750, 998]),
        "prob": torch.tensor([1.0, 1.0, 0.5, 0.8, 1.0], dtype=dtype),
        "correction": -0.001 * torch.rand(1000, generator=generator, dtype=torch.float64),
    }


def by_objective(x: dict, method: str, shape: str, beta: float, sft_weight: float, recorded: bool):
    policy = x["policy"].clone().requires_grad_()
    table = tables(method, from_scheduler({**SD15, "prediction_type": "epsilon"}))
    correction = x["correction"] if METHODS[method].correction else torch.zeros(1000, dtype=torch.float64)
    errors = torch.stack(
        [*sample_errors(policy, x["target"]).chunk(2), *sample_errors(x["reference"], x["target"]).chunk(2)]
    )
    d = None if recorded else pair_difference(policy, x["reference"], x["target"])
    terms = pair_terms(
        errors, x["t"], x["prob"], table.weight, correction, beta, shape, sft_weight=sft_weight, difference=d
    )
    return terms, torch.autograd.grad(terms.loss.sum(), policy)[0], (table.weight, correction)


def by_kernel(x: dict, weight: torch.Tensor, correction: torch.Tensor, beta: float, **options):
    policy = x["policy"].clone().requires_grad_()
    usable = torch.ones(PAIRS, dtype=torch.float32)
    terms = terms_of(
        pair_errors,
        policy,
        x["t"],
        x["prob"],
        usable,
        weight,
        correction,
        beta,
        target=x["target"],
        **{"shape": "sigmoid"} | options,
    )
    return terms, torch.autograd.grad(terms.loss.sum(), policy)[0]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if "loss" in spec.settings])
def test_float64_agreement(method, shape, sft_weight, recorded):
    x = inputs()
    expected, gradient, (weight, correction) = by_objective(x, method, shape, 2000.0, sft_weight, recorded)
    reference = (
        {"recorded": torch.stack(sample_errors(x["reference"], x["target"]).chunk(2))}
        if recorded
        else {"reference": x["reference"]}
    )
    terms, slope = by_kernel(x, weight, correction, 2000.0, shape=shape, sft_weight=sft_weight, **reference)
    close = {"rtol": 1e-8, "atol": 1e-9}
    assert terms.loss.dtype == torch.float64
    for name in ("loss", "logit", "difference", "errors", "accuracy"):
        torch.testing.assert_close(
            getattr(terms, name), getattr(expected, name), msg=lambda m, name=name: f"{name}: {m}", **close
        )
    torch.testing.assert_close(slope, gradient, rtol=1e-8, atol=1e-11)
    counted = x["prob"] > 0.5
    assert terms.table_count.sum() == counted.sum() == 4
    torch.testing.assert_close(
        terms.table_sum[x["t"]], torch.where(counted, expected.difference, 0.0).detach(), **close
    )


def test_without_a_reference_it_is_the_supervised_loss():
    x = inputs()
    weight = torch.ones(1000, dtype=torch.float64)
    terms, slope = by_kernel(x, weight, 0 * weight, 2000.0, shape="sigmoid")
    policy = x["policy"].clone().requires_grad_()
    loss = sample_errors(policy, x["target"]).chunk(2)[0]
    torch.testing.assert_close(terms.loss, loss)
    torch.testing.assert_close(slope, torch.autograd.grad(loss.sum(), policy)[0])
    assert all(x.isnan().all() for x in (terms.logit, terms.difference, terms.accuracy, *terms.errors[2:]))


@pytest.mark.parametrize("method", ["dpo", "dde"])
def test_single_precision_stays_near_the_oracle(method):
    x, beta = inputs(torch.float32), 2000.0 if method == "dpo" else 200.0
    widened = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    exact, gradient, (weight, correction) = by_objective(widened, method, "sigmoid", beta, 0.0, False)
    terms, slope = by_kernel(x, weight, correction, beta, shape="sigmoid", reference=x["reference"])
    assert terms.logit.dtype == torch.float32
    torch.testing.assert_close(terms.logit.double(), exact.logit.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_equal_predictions_are_exactly_ln2():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = inputs(torch.float64)
        policy, target = x["policy"].to(dtype), x["target"].to(dtype)
        real = torch.promote_types(dtype, torch.float32)
        terms = terms_of(
            pair_errors,
            policy,
            x["t"],
            x["prob"],
            torch.ones(PAIRS),
            torch.ones(1000),
            torch.zeros(1000),
            5000.0,
            shape="sigmoid",
            reference=policy.clone(),
            target=target,
        )
        assert terms.logit.count_nonzero() == 0 and terms.loss.dtype == real
        assert torch.equal(terms.loss, torch.full((PAIRS,), 2.0, dtype=torch.float64).log().to(real))


@pytest.mark.parametrize(
    "case", [c for c in range(len(CASES)) if f"{c}/hf-sd15/margin" in GOLDEN or CASES[c]["loss_type"] == "ipo"]
)
def test_recorded_cases_in_single_precision(case):
    """Every margin of the other trainers' recorded cases within 1e-3 of the float64 truth, half-precision inputs
    included.
    """
    exact = ours(case)
    policy = array(case, "policy").float().requires_grad_()
    pairs = policy.shape[0] // 2
    terms = terms_of(
        pair_errors,
        policy,
        torch.zeros(pairs, dtype=torch.int64),
        torch.ones(pairs),
        torch.ones(pairs),
        torch.ones(1000),
        torch.zeros(1000),
        float(CASES[case]["beta"]),
        shape=CASES[case]["loss_type"],
        reference=array(case, "reference").float(),
        target=target_of(case, torch.float32),
    )
    assert (terms.logit.double() - exact.terms.logit).abs().max() < 1e-3
    assert torch.equal(terms.accuracy.double(), exact.terms.accuracy)
    torch.testing.assert_close(terms.loss.mean().double(), exact.loss, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(terms.loss.mean(), policy)[0].double()
    saturated = CASES[case]["beta"] / policy.numel() * 2**-22  # rounding of sigmoid(z) - p where the sigmoid is flat
    torch.testing.assert_close(
        gradient, exact.gradient, rtol=2e-3, atol=1e-5 * exact.gradient.abs().max().item() + saturated
    )

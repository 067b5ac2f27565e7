"""The kernels of pair_errors in the interpreter, the objective behind them, against float64: at most twice the error of
plain torch as peers write it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from csrc_triton.noising import pair_noise
from csrc_triton.pair_errors import PairErrors, _checked, _forward_reference, _launch_backward, _launch_forward, slopes
from dpo.objective import PairTerms, pair_loss

T, BETA = 50, 20.0
ALPHAS = torch.linspace(0.999, 0.005, T)
V = {"of_noise": ALPHAS.sqrt(), "of_data": -(1 - ALPHAS).sqrt()}
SHAPES = ("sigmoid", "hinge", "ipo")
QUICK = [
    # pairs, shape, dtype, loss, source, reference, layout
    (1, (4, 9, 9), torch.bfloat16, "sigmoid", "epsilon", "live", "contiguous"),
    (3, (4, 23, 25), torch.float32, "sigmoid", "v", "live", "channels_last"),
    (5, (3, 5, 7), torch.float16, "hinge", "target", "recorded", "offset"),
    (2, (4, 8, 8), torch.bfloat16, "ipo", "shared", "live", "strided"),
]
SOURCES = [("epsilon", "live"), ("v", "recorded"), ("target", "live"), ("shared", "recorded"), ("v", "live")]
LAYOUTS = ("contiguous", "channels_last", "offset", "strided")
FULL = [  # losses and layouts take turns, so that every value meets every other without the whole product
    (batch, shape, dtype, SHAPES[(i + j + k) % 3], source, reference, LAYOUTS[(i + 2 * j + k) % 4])
    for i, (batch, shape) in enumerate(
        [(1, (1, 1, 1)), (2, (4, 24, 24)), (3, (4, 23, 25)), (4, (3, 5, 7)), (5, (4, 33, 31))]
    )
    for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    for k, (source, reference) in enumerate(SOURCES)
]


def arrange(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, dim=3)[..., ::2]
    return x


def world(batch, shape, dtype, source, layout):
    """policy, reference, target (2B), keywords of the source, timesteps, prob, weight, correction."""
    generator = torch.Generator().manual_seed(7 * batch + shape[-1])

    def draw(*size):
        return torch.randn(*size, generator=generator)

    offset = 4.0 if layout == "offset" else 0.0  # predictions far from zero mean
    policy = arrange((draw(2 * batch, *shape) + offset).to(dtype), layout)
    reference = arrange(
        (policy + 0.1 * draw(2 * batch, *shape)).to(dtype), "contiguous" if layout == "channels_last" else layout
    )
    timesteps = torch.randint(0, T, (batch,), generator=generator)
    timesteps[-1] = timesteps[0]
    noise = (torch.randint(-(2**62), 2**62, (batch,), generator=generator), torch.arange(batch), torch.tensor(3))
    latents = draw(2 * batch, *shape)
    keywords = dict.fromkeys(("target", "noise", "latents", "of_noise", "of_data"))
    if source in ("target", "shared"):
        keywords["target"] = draw(2 * batch if source == "target" else batch, *shape) + offset
        target = keywords["target"].repeat(2 if source == "shared" else 1, 1, 1, 1)
    elif source == "epsilon":
        keywords["noise"], target = noise, pair_noise(*noise, shape).repeat(2, 1, 1, 1)
    else:
        keywords |= {"noise": noise, "latents": latents, **V}
        of_noise, of_data = (table[timesteps].repeat(2).view(-1, 1, 1, 1) for table in V.values())
        target = of_noise * pair_noise(*noise, shape).repeat(2, 1, 1, 1) + of_data * latents
    prob = torch.tensor([1.0, 0.9, 0.5, 0.75, 1.0]).repeat(batch)[:batch]
    return policy, reference, target, keywords, timesteps, prob, draw(T).abs(), 0.1 * draw(T)


def usual(policy, reference, recorded, target, timesteps, prob, weight, correction, shape, dtype):
    """The loss as trainers write it, in `dtype` arithmetic: (errors of the policy [2B], loss, gradient)."""
    leaf = policy.detach().clone().requires_grad_()
    errors = F.mse_loss(leaf.to(dtype), target.to(dtype), reduction="none").flatten(1).mean(1)
    if recorded is None:
        frozen = F.mse_loss(reference.to(dtype), target.to(dtype), reduction="none").flatten(1).mean(1)
    else:
        frozen = recorded.flatten().to(dtype)
    win, lose = (errors - frozen).chunk(2)
    prob, weight, correction = prob.to(dtype), weight.to(dtype)[timesteps], correction.to(dtype)[timesteps]
    z = -(BETA / 2) * (weight * (win - lose) + torch.where(prob == 0.5, 0.0, correction))
    f = {"sigmoid": lambda x: -F.logsigmoid(x), "hinge": lambda x: F.relu(1 - x), "ipo": lambda x: (x - 0.5) ** 2}[
        shape
    ]
    if shape == "ipo":  # with the safeguard
        (win, lose), (win_residual, lose_residual) = (
            errors.chunk(2),
            (leaf.to(dtype) - target.to(dtype)).detach().flatten(1).chunk(2),
        )
        product = (win_residual * lose_residual).mean(1)
        factor = torch.where(product > 0, (0.5 * win.detach() / product).clamp(max=1), 1.0)
        z = z + BETA / 2 * weight * (factor - 1) * (lose - lose.detach())
    loss = prob * f(z) + (1 - prob) * f(-z)
    loss.sum().backward()
    return errors.detach(), loss.detach(), leaf.grad


class Launched(NamedTuple):
    """What training would see of one launch, and how to go backwards from the sum of the losses."""

    terms: PairTerms
    slopes: torch.Tensor  # [2, B]
    aside: torch.Tensor  # [2, B]: gain and product
    tables: torch.Tensor  # [2, T]
    backward: Callable[[], torch.Tensor]

    def values(self) -> list[torch.Tensor]:
        return [
            self.terms.loss,
            self.terms.logit,
            self.terms.difference,
            self.terms.errors,
            self.terms.accuracy,
            self.aside,
            self.tables,
        ]


def launch(
    policy, reference, recorded, keywords, timesteps, prob, weight, correction, shape, usable=None, run=_launch_forward
):
    usable = torch.ones(len(prob)) if usable is None else usable
    policy, reference, recorded, aim, rest = _checked(
        policy, timesteps, prob, usable, weight, correction, BETA, reference, recorded, **keywords
    )
    logit, difference, errors, gain, product, tables = run(policy, reference, recorded, aim, *rest)
    leaves = [x.detach().requires_grad_() for x in (logit, difference, errors)]
    supervised = reference is None and recorded is None
    found = PairErrors(*leaves, *tables, gain, product)
    safeguard = 0.5 if shape == "ipo" else None  # one of the shapes with it, so that its product is looked at
    terms = pair_loss(found, prob, usable, timesteps, shape=None if supervised else shape, safeguard=safeguard)
    gradients = torch.autograd.grad(terms.loss.sum(), leaves, allow_unused=True)
    by_side = slopes(gain, *gradients)
    return Launched(
        terms,
        by_side,
        torch.stack((gain, product)),
        tables,
        lambda: _launch_backward(by_side, policy, aim, timesteps, usable),
    )


def compare(batch, shape, dtype, loss_shape, source, kind, layout, no_worse):
    policy, reference, target, keywords, timesteps, prob, weight, correction = world(
        batch, shape, dtype, source, layout
    )
    recorded = None
    if kind == "recorded":
        recorded, reference = (reference.float() - target).square().flatten(1).mean(1).view(2, batch), None
    rest = (timesteps, prob, weight, correction, loss_shape)
    found = launch(policy, reference, recorded, keywords, *rest)
    terms = found.terms
    exact_errors, exact_loss, exact_gradient = usual(policy.double(), reference, recorded, target, *rest, torch.float64)
    plain_errors, plain_loss, plain_gradient = usual(policy, reference, recorded, target, *rest, torch.float32)
    no_worse(terms.errors[:2].flatten(), plain_errors, exact_errors)
    # Recorded errors are subtracted from errors rounded to fp32: one unit in their last place, carried to loss and slope (f'' <= 2).
    last_place = torch.finfo(torch.float32).eps
    lost = last_place * exact_errors.max().item() if recorded is not None else 0.0
    slope_lost = 4 * lost * (BETA / 2 * weight[timesteps].max().item()) ** 2
    residuals = [(policy.to(real) - target.to(real)).flatten(1).chunk(2) for real in (torch.float32, torch.float64)]
    no_worse(found.aside[1], *((win * lose).mean(1) for win, lose in residuals))
    no_worse(terms.loss.detach(), plain_loss, exact_loss, floor=2 * lost * found.slopes.abs().max().item())
    gradient = found.backward()
    assert gradient.is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    largest = 2 * (policy.double() - target).abs().max().item() / math.prod(shape)
    floor = slope_lost * largest + 2 * last_place * exact_gradient.abs().max().item()  # five fp32 roundings on the way
    no_worse(gradient, plain_gradient, exact_gradient, floor=floor)
    expected = launch(policy, reference, recorded, keywords, *rest, run=_forward_reference)
    for actual, wanted in zip(found.values()[:-1], expected.values()[:-1]):
        torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5 + slope_lost)
    torch.testing.assert_close(found.slopes, expected.slopes, rtol=2e-5, atol=2e-5 + slope_lost)
    torch.testing.assert_close(found.tables, expected.tables, rtol=2e-5, atol=2e-6 + 4 * lost)


@pytest.mark.parametrize("batch, shape, dtype, loss_shape, source, kind, layout", QUICK)
def test_accuracy(batch, shape, dtype, loss_shape, source, kind, layout, no_worse):
    compare(batch, shape, dtype, loss_shape, source, kind, layout, no_worse)


@pytest.mark.slow
@pytest.mark.parametrize("batch, shape, dtype, loss_shape, source, kind, layout", FULL)
def test_full_grid(batch, shape, dtype, loss_shape, source, kind, layout, no_worse):
    compare(batch, shape, dtype, loss_shape, source, kind, layout, no_worse)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_logits_leave_small_slopes_their_digits(sign):
    policy, _, _, keywords, _, _, _, _ = world(3, (3, 5, 7), torch.float32, "target", "contiguous")
    timesteps, prob = torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 0.75])
    correction = torch.zeros(T)
    correction[:3] = torch.tensor([18.0, 40.0, 25.0]) * (-2 * sign / BETA)
    found = launch(policy, policy, None, keywords, timesteps, prob, torch.ones(T), correction, "sigmoid")
    z = found.terms.logit.double()
    assert (z * sign >= 17.9).all()
    exact = ((1 - prob.double()) * torch.sigmoid(z) - prob.double() * torch.sigmoid(-z)) * (-BETA / 2)
    torch.testing.assert_close(found.slopes[0].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.slopes[1], -found.slopes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_equal_to_reference_is_exact(dtype):
    policy, _, _, keywords, timesteps, prob, weight, _ = world(4, (3, 5, 7), dtype, "v", "contiguous")
    found = launch(policy, policy.clone(), None, keywords, timesteps, prob, weight, torch.zeros(T), "sigmoid")
    loss = found.terms.loss
    assert (
        not found.terms.logit.any()
        and not found.terms.difference.any()
        and torch.equal(loss, torch.full_like(loss, 2.0).log())
    )
    errors = found.terms.errors[:2].clone()
    again = launch(policy, None, errors, keywords, timesteps, prob, weight, torch.zeros(T), "sigmoid")
    assert torch.equal(again.terms.loss, loss) and found.backward().count_nonzero() > 0


def test_determinism_and_permutation():
    policy, reference, target, _, timesteps, prob, weight, correction = world(
        5, (4, 23, 25), torch.bfloat16, "target", "contiguous"
    )

    def run(order):
        both = torch.cat([order, order + 5])
        keywords = dict.fromkeys(("noise", "latents", "of_noise", "of_data")) | {"target": target[both]}
        found = launch(
            policy[both], reference[both], None, keywords, timesteps[order], prob[order], weight, correction, "sigmoid"
        )
        return [*found.values(), found.backward()]

    identity, order = torch.arange(5), torch.tensor([3, 0, 4, 1, 2])
    first, second, permuted = run(identity), run(identity), run(order)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b[..., order]) for a, b in zip(permuted[:6], first[:6]))
    assert torch.equal(permuted[6], first[6]) and torch.equal(permuted[7], first[7][torch.cat([order, order + 5])])


def test_holes_and_supervised():
    policy, reference, target, keywords, timesteps, prob, weight, correction = world(
        3, (3, 5, 7), torch.float32, "target", "contiguous"
    )
    for broken in (policy, reference, target):
        broken[[1, 4]] = math.nan
    timesteps[1] = 10**6
    keywords["target"], usable = target, torch.tensor([1.0, 0.0, 1.0])
    rest = (timesteps, prob, weight, correction, "sigmoid", usable)
    for frozen in (reference, None):
        found = launch(policy, frozen, None, keywords, *rest)
        expected = launch(policy, frozen, None, keywords, *rest, run=_forward_reference)
        for actual, wanted in zip(found.values(), expected.values()):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5, equal_nan=frozen is None)
        gradient = found.backward()
        assert all(not value[..., 1].any() for value in found.values()[:6])
        assert (gradient[[1, 4]] == 0).all() and gradient.isfinite().all()


def test_more_pairs_than_one_tile_of_the_finish():
    """70 pairs: several rounds of the last program and of the table, with many pairs at one timestep."""
    policy, reference, _, keywords, _, _, weight, correction = world(
        70, (1, 3, 3), torch.float32, "epsilon", "contiguous"
    )
    timesteps, prob = torch.arange(70) % 7, torch.ones(70)
    rest = (policy, reference, None, keywords, timesteps, prob, weight, correction, "sigmoid")
    found, expected = launch(*rest), launch(*rest, run=_forward_reference)
    torch.testing.assert_close(found.terms.loss, expected.terms.loss, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.tables, expected.tables, rtol=1e-5, atol=1e-5)
    assert found.tables[1, :7].tolist() == [10] * 7

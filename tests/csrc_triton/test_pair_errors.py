"""pair_errors on the CPU, with the objective behind it, against an independent float64 form; the op contract; exactness
facts.

The kernels: interpreted/check_pair_errors.py.
"""

import math

import pytest
import torch

from csrc_triton.noising import pair_noise
from csrc_triton.pair_errors import pair_errors, pair_errors_reference
from dpo.objective import SHAPES
from tests.help.oracle import pair_difference, pair_terms, sample_errors, terms_of

B, T, SHAPE = 5, 12, (3, 4, 5)
TIMESTEPS = torch.tensor([0, 3, 3, 11, 3])
PROB = torch.tensor([1.0, 0.9, 0.5, 1.0, 0.7])
ALL = torch.ones(B)
NOISE = (torch.tensor([3, -9, 2**60, 7, 0]), torch.tensor([0, 5, 1, 1, 2]), torch.tensor(17))
ALPHAS = torch.linspace(0.999, 0.01, T, dtype=torch.float64)
ONES = torch.ones(T, dtype=torch.float64)
PATHS = {  # target = of_noise eps + of_data x_0
    "v": {"of_noise": ALPHAS.sqrt(), "of_data": -(1 - ALPHAS).sqrt()},
    "flow": {"of_noise": ONES, "of_data": -ONES},
}
BETA = torch.tensor(3.0)


def world(dtype=torch.float64):
    """policy, reference, target, latents [2B, C, H, W] and weight, correction [T]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    policy = draw(2 * B, *SHAPE)
    return policy, policy + 0.3 * draw(2 * B, *SHAPE), draw(2 * B, *SHAPE), draw(2 * B, *SHAPE), draw(T).abs(), draw(T)


def oracle(policy, reference, target, weight, correction, shape, sft_weight=0.0, timesteps=TIMESTEPS, prob=PROB):
    errors = torch.cat([sample_errors(policy, target), sample_errors(reference, target)]).view(4, -1)
    d = pair_difference(policy, reference, target)
    return pair_terms(errors, timesteps, prob, weight, correction, BETA, shape, sft_weight=sft_weight, difference=d)


@pytest.mark.parametrize("function", [pair_errors, pair_errors_reference])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", ["target", "shared", "epsilon", "v", "flow"])
@pytest.mark.parametrize("recorded", [False, True])
def test_against_the_objective(function, shape, source, recorded):
    policy, reference, target, latents, weight, correction = world()
    policy.requires_grad_()
    keywords = {"sft_weight": 0.25}
    if source == "target":
        keywords["target"] = target
    elif source == "shared":
        keywords["target"], target = target[:B], target[:B].repeat(2, 1, 1, 1)
    elif source == "epsilon":
        keywords["noise"], target = NOISE, pair_noise(*NOISE, SHAPE, torch.float64).repeat(2, 1, 1, 1)
    else:
        keywords |= {"noise": NOISE, "latents": latents, **PATHS[source]}
        noise = pair_noise(*NOISE, SHAPE, torch.float64).repeat(2, 1, 1, 1)
        of_noise, of_data = (table[TIMESTEPS].repeat(2).view(-1, 1, 1, 1) for table in PATHS[source].values())
        target = of_noise * noise + of_data * latents
    expected = oracle(policy, reference, target, weight, correction, shape, 0.25)
    if recorded:
        keywords["recorded"] = expected.errors[2:].detach()
    else:
        keywords["reference"] = reference
    actual = terms_of(function, policy, TIMESTEPS, PROB, ALL, weight, correction, BETA, shape=shape, **keywords)
    for name in ("loss", "logit", "difference", "errors", "accuracy"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(0.5, 2, B, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(actual.loss, policy, upstream)
    (exact,) = torch.autograd.grad(expected.loss, policy, upstream)
    torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-13)
    counted = PROB > 0.5
    for t in range(T):
        chosen = counted & (t == TIMESTEPS)
        assert actual.table_count[t] == chosen.sum()
        torch.testing.assert_close(actual.table_sum[t], expected.difference[chosen].sum().detach())


@pytest.mark.parametrize("function", [pair_errors, pair_errors_reference])
def test_gain_and_product_of_the_residuals(function):
    policy, reference, target, _, weight, correction = world()
    usable = ALL.clone()
    usable[1], policy[1] = 0, math.nan
    found = function(
        policy.requires_grad_(), TIMESTEPS, PROB, usable, weight, correction, BETA, reference=reference, target=target
    )
    win, lose = (policy - target).detach().chunk(2)
    live = usable > 0
    expected = torch.where(live, (win * lose).flatten(1).mean(1), 0.0)
    torch.testing.assert_close(found.product, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.gain, torch.where(live, -BETA / 2 * weight[TIMESTEPS], 0.0).double())
    assert not found.product.requires_grad and not found.gain.requires_grad and found.product[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", [pair_errors, pair_errors_reference])
def test_policy_equal_to_reference_is_exact(function, dtype):
    policy, _, target, _, weight, _ = world(dtype)
    policy.requires_grad_()
    zero = torch.zeros(T)
    terms = terms_of(
        function,
        policy,
        TIMESTEPS,
        PROB,
        ALL,
        weight,
        zero,
        2000.0,
        shape="sigmoid",
        reference=policy.detach(),
        target=target,
    )
    assert (terms.logit == 0).all() and (terms.accuracy == 0.5).all()
    assert terms.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(terms.loss, torch.full_like(terms.loss, 2.0).log())
    again = terms_of(
        function,
        policy,
        TIMESTEPS,
        PROB,
        ALL,
        weight,
        zero,
        2000.0,
        shape="sigmoid",
        recorded=terms.errors[:2],
        target=target,
    )
    assert (again.logit == 0).all() and torch.equal(again.loss, terms.loss)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), policy)
    assert gradient.dtype == dtype and (gradient[PROB.repeat(2) > 0.5] != 0).any()


@pytest.mark.parametrize("function", [pair_errors, pair_errors_reference])
def test_a_large_logit_leaves_the_small_gradient_its_digits(function):
    def gradient(dtype):
        policy, _, target, _, _, _ = world(torch.float32)
        policy = policy.to(dtype).requires_grad_()
        terms = terms_of(
            function,
            policy,
            torch.arange(B),
            ALL,
            ALL,
            torch.ones(T),
            -torch.linspace(18.0, 60.0, T),
            2.0,
            shape="sigmoid",
            reference=policy.detach(),
            target=target.to(dtype),
        )
        assert (terms.logit >= 18).all()
        return torch.autograd.grad(terms.loss.sum(), policy)[0].double()

    exact = gradient(torch.float64)
    torch.testing.assert_close(gradient(torch.float32), exact, rtol=1e-4, atol=1e-6 * exact[B - 1].abs().max().item())


@pytest.mark.parametrize("function", [pair_errors, pair_errors_reference])
def test_holes_contribute_nothing_anywhere(function):
    policy, reference, target, _, weight, correction = world()
    usable = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    keep = usable > 0
    hole = ~keep.repeat(2)
    timesteps = torch.where(keep, TIMESTEPS, 10**6)  # nor is a hole's timestep looked up
    policy[hole], reference[hole], target[hole] = math.nan, math.inf, math.nan
    policy.requires_grad_()
    terms = terms_of(
        function,
        policy,
        timesteps,
        PROB,
        usable,
        weight,
        correction,
        BETA,
        shape="sigmoid",
        reference=reference,
        target=target,
        sft_weight=1.0,
    )
    both = keep.repeat(2)
    alone = terms_of(
        function,
        policy[both],
        TIMESTEPS[keep],
        PROB[keep],
        ALL[keep],
        weight,
        correction,
        BETA,
        shape="sigmoid",
        reference=reference[both],
        target=target[both],
        sft_weight=1.0,
    )
    for name in ("loss", "logit", "difference", "errors", "accuracy"):
        value = getattr(terms, name)
        assert torch.equal(value[..., keep], getattr(alone, name)) and (value[..., ~keep] == 0).all(), name
    assert torch.equal(terms.table_sum, alone.table_sum) and torch.equal(terms.table_count, alone.table_count)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), policy)
    assert (gradient[hole] == 0).all() and (gradient[~hole] != 0).all()


def test_ties_take_no_correction_and_stay_out_of_the_table():
    policy, reference, target, _, weight, correction = world()
    terms = terms_of(
        pair_errors,
        policy,
        TIMESTEPS,
        torch.full((B,), 0.5),
        ALL,
        weight,
        correction,
        BETA,
        shape="sigmoid",
        reference=reference,
        target=target,
    )
    torch.testing.assert_close(terms.logit, -0.5 * BETA.double() * weight[TIMESTEPS] * terms.difference)
    assert (terms.table_sum == 0).all() and (terms.table_count == 0).all()


def test_supervised():
    policy, _, target, _, weight, correction = world()
    policy.requires_grad_()
    terms = terms_of(
        pair_errors, policy, TIMESTEPS, PROB, ALL, weight, correction, BETA, shape="sigmoid", target=target
    )
    torch.testing.assert_close(terms.loss, sample_errors(policy, target)[:B])
    assert torch.equal(terms.loss, terms.errors[0]) and terms.logit.isnan().all() and terms.difference.isnan().all()
    (gradient,) = torch.autograd.grad(terms.loss.sum(), policy)
    torch.testing.assert_close(gradient[:B], 2 * (policy - target)[:B].detach() / math.prod(SHAPE))
    assert (gradient[B:] == 0).all()


def test_swapping_the_halves_flips_the_label():
    policy, reference, target, _, weight, _ = world()
    swap = torch.cat([torch.arange(B, 2 * B), torch.arange(B)])
    for shape in SHAPES:
        one, other = (
            terms_of(
                pair_errors,
                policy[i],
                TIMESTEPS,
                p,
                ALL,
                weight,
                torch.zeros(T),
                BETA,
                shape=shape,
                reference=reference[i],
                target=target[i],
            )
            for i, p in ((torch.arange(2 * B), PROB), (swap, 1 - PROB))
        )
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-6)  # 1 - p was rounded to fp32


def test_determinism_permutation_and_layout():
    policy, reference, target, _, weight, correction = world(torch.float32)
    arguments = (weight, correction, BETA)

    def run(order, memory_format=torch.contiguous_format):
        both = torch.cat([order, order + B])
        leaf = policy[both].to(memory_format=memory_format).requires_grad_()
        terms = terms_of(
            pair_errors,
            leaf,
            TIMESTEPS[order],
            PROB[order],
            ALL,
            *arguments,
            shape="sigmoid",
            reference=reference[both],
            target=target[both],
        )
        return terms, torch.autograd.grad(terms.loss.sum(), leaf)[0]

    identity, order = torch.arange(B), torch.tensor([4, 2, 0, 3, 1])
    first, gradient = run(identity)
    second, gradient_again = run(identity)
    permuted, permuted_gradient = run(order)
    last, last_gradient = run(identity, torch.channels_last)
    same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second)]  # nan: sizes, not taken here
    assert all(same) and torch.equal(gradient, gradient_again)
    for name in ("loss", "logit", "difference", "errors", "accuracy"):
        assert torch.equal(getattr(permuted, name), getattr(first, name)[..., order]), name
    assert torch.equal(permuted.table_sum, first.table_sum) and torch.equal(permuted.table_count, first.table_count)
    assert torch.equal(permuted_gradient, gradient[torch.cat([order, order + B])])
    torch.testing.assert_close(last.loss, first.loss)
    assert last_gradient.is_contiguous(memory_format=torch.channels_last) and torch.equal(last_gradient, gradient)


def arguments_of_the_op(dtype, source, recorded=False):
    policy, reference, target, latents, weight, correction = world(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mixture = tuple(table.to(wide) for table in PATHS["v"].values())
    keyed = {"target": (target, *[None] * 6), "v": (None, latents, *mixture, *NOISE)}[source]
    pair = (None, torch.rand(2, B, dtype=wide)) if recorded else (reference, None)
    tables = (x.to(wide) for x in (PROB, ALL, weight, correction, BETA))
    return (policy.requires_grad_(), *pair, *keyed, TIMESTEPS, *tables)


@pytest.mark.parametrize("source, recorded, dtype", [("target", False, torch.float32), ("v", True, torch.bfloat16)])
def test_opcheck(source, recorded, dtype):
    torch.library.opcheck(torch.ops.csrc_triton.pair_errors, arguments_of_the_op(dtype, source, recorded))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_of_the_backward(memory_format):
    policy, _, _, latents, _, _ = world(torch.bfloat16)
    arguments = (
        torch.rand(2, B),
        policy.to(memory_format=memory_format),
        None,
        latents,
        *(table.float() for table in PATHS["v"].values()),
        *NOISE,
        TIMESTEPS,
        ALL,
    )
    torch.library.opcheck(torch.ops.csrc_triton.pair_errors_backward, arguments)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", ["target", "v"])
def test_gradcheck(shape, source):
    policy, reference, target, latents, weight, correction = world()
    small = torch.cat([torch.arange(2), torch.arange(2) + B])
    keywords = {"reference": reference[small][:, :1], "shape": shape, "sft_weight": 0.2}
    if source == "target":
        keywords["target"] = target[small][:, :1]
    else:
        noise = (NOISE[0][:2], NOISE[1][:2], NOISE[2])
        keywords |= {"noise": noise, "latents": latents[small][:, :1], **PATHS["v"]}
    torch.autograd.gradcheck(
        lambda p: (
            terms_of(
                pair_errors, p, TIMESTEPS[:2], PROB[:2].double(), ALL[:2], weight, correction, BETA.double(), **keywords
            ).loss
        ),
        policy[small][:, :1].clone().requires_grad_(),
    )


def test_compiles_into_one_graph():
    policy, reference, _, latents, weight, correction = world(torch.float32)

    def function(p, beta):
        terms = terms_of(
            pair_errors,
            p * 1.5,
            TIMESTEPS,
            PROB,
            ALL,
            weight,
            correction,
            beta,
            shape="sigmoid",
            reference=reference,
            noise=NOISE,
            latents=latents,
            **PATHS["v"],
        )
        return terms.loss.sum(), terms.table_sum, terms.accuracy

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        leaf = policy.clone().requires_grad_()
        loss, table, accuracy = run(leaf, BETA)
        loss.backward()
        results.append((loss.detach(), table, accuracy, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_refusals():
    policy, reference, target, latents, weight, correction = world(torch.float32)
    arguments = (policy, TIMESTEPS, PROB, ALL, weight, correction, 1.0)
    for message, keywords in {
        "give either": {},
        "exclude each other": {"target": target, "reference": reference, "recorded": torch.zeros(2, B)},
        "belong together": {"noise": NOISE, "latents": latents},
        "recorded errors must be": {"noise": NOISE, "recorded": torch.zeros(B, 2)},
    }.items():
        with pytest.raises(AssertionError, match=message):
            pair_errors(*arguments, **keywords)

"""dpo.objective: other trainers' recorded losses, the facts of docs/method.md, and gradients in float64."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from csrc_triton.pair_errors import pair_errors
from dpo import methods, objective
from dpo.common.errors import UserError
from dpo.correction import CorrectionTable
from dpo.credit import tables
from dpo.methods import METHODS
from dpo.objective import SHAPES
from dpo.schedule import Schedule, from_scheduler
from dpo.settings.config import from_mapping, validate
from tests.help.oracle import logits, pair_difference, pair_terms, sample_errors

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "golden_loss.npz")
CASES = json.loads(str(GOLDEN["manifest"]))
PEERS = ("hf-sd15", "hf-sdxl", "sf")
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # unit roundoff
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LN2 = math.log(2)


# --- other trainers' own loss lines ---------------------------------------------------------------------------------


def array(case: int, name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[f"{case}/{name}"]))


def target_of(case: int, dtype: torch.dtype) -> torch.Tensor:
    noise = array(case, "noise").to(dtype)
    if CASES[case]["prediction_type"] == "epsilon":
        return noise
    abar = DDPMScheduler(**SD15).alphas_cumprod.to(dtype)[array(case, "timesteps")].view(-1, 1, 1, 1)
    return abar.sqrt() * noise - (1 - abar).sqrt() * array(case, "latents").to(dtype)


@dataclass
class Ours:
    terms: objective.PairTerms
    loss: torch.Tensor
    gradient: torch.Tensor


def ours(case: int, dtype: torch.dtype = torch.float64, *, factor: float = 1.0, shape: str | None = None) -> Ours:
    """Our dpo on a recorded case, with beta times `factor`."""
    policy = array(case, "policy").to(dtype).requires_grad_()
    reference, target = array(case, "reference").to(dtype), target_of(case, dtype)
    errors = torch.stack([*sample_errors(policy, target).chunk(2), *sample_errors(reference, target).chunk(2)])
    pairs = errors.shape[1]
    terms = pair_terms(
        errors,
        torch.zeros(pairs, dtype=torch.int64),
        torch.ones(pairs, dtype=dtype),
        torch.ones(1000, dtype=dtype),
        torch.zeros(1000, dtype=dtype),
        CASES[case]["beta"] * factor,
        shape or CASES[case]["loss_type"],
        difference=pair_difference(policy, reference, target),
    )
    loss = terms.loss.mean()
    (gradient,) = torch.autograd.grad(loss, policy)
    return Ours(terms, loss.detach(), gradient)


def has(case: int, peer: str) -> bool:
    return f"{case}/{peer}/loss" in GOLDEN


def factor_of(peer: str) -> float:
    return 2.0 if peer == "hf-sd15" else 1.0  # that script has no 1/2


@dataclass
class Rounding:
    margin: torch.Tensor  # [B] float64, how far the peer's margin may be from the exact one
    unit: float  # of its last operations


def rounding_of(case: int, peer: str, truth: Ours) -> Rounding:
    """What a peer's own arithmetic may do to its margin.

    Each error is a mean of N squares: subtraction, square and final rounding cost (3 + 1) u, the accumulation in fp32
    up to log2(N) u32. The two Hugging Face scripts widen to fp32 first; sf works in the tensors' own dtype, where the
    first three roundings are independent between elements (6 standard deviations of their mean) and the last one is
    not.
    """
    kinds = {"policy": "float32", "reference": "float32", **CASES[case]["dtypes"]} if peer == "sf" else {}
    n = array(case, "policy")[0].numel()
    errors = truth.terms.errors.detach()
    u32 = UNIT["float32"]
    slack = torch.zeros_like(errors)
    for rows, name in ((slice(0, 2), "policy"), (slice(2, 4), "reference")):
        u = UNIT[kinds.get(name, "float32")]
        slack[rows] = errors[rows] * ((1 + 18 / math.sqrt(n)) * u + (4 + math.log2(n)) * u32)
    if CASES[case]["prediction_type"] == "v_prediction":  # the target itself is computed in fp32: 4 roundings
        target, policy = target_of(case, torch.float64), array(case, "policy").double()
        shift = 4 * u32 * (array(case, "noise").double().abs() + array(case, "latents").double().abs())
        extra = (2 * (policy - target).abs() * shift).flatten(1).mean(1)
        slack += torch.stack([*extra.chunk(2)]).repeat(2, 1)
    scale = CASES[case]["beta"] * factor_of(peer) / 2
    u_last = UNIT[kinds.get("policy", "float32")]
    return Rounding(scale * slack.sum(0) + 4 * u_last * truth.terms.logit.detach().abs() + 1e-12, u_last)


RECORDED = [(case, peer) for case in range(len(CASES)) for peer in PEERS if has(case, peer)]


def test_every_case_is_here():
    assert len(CASES) == 30 and len(RECORDED) == 24 * 3 + 2 * 2 + 2


@pytest.mark.parametrize(("case", "peer"), RECORDED)
def test_peer_approaches_our_float64_within_its_own_rounding(case, peer):
    truth = ours(case, factor=factor_of(peer))
    rounding = rounding_of(case, peer, truth)
    z = truth.terms.logit.detach()
    assert ((array(case, f"{peer}/margin").double() - z).abs() <= rounding.margin).all()
    wide = rounding.margin.max()
    assert (
        array(case, f"{peer}/loss").double() - truth.loss
    ).abs() <= wide + 8 * rounding.unit * truth.loss.abs() + 1e-7
    for name, rows, kind in (("model_loss", slice(0, 2), "policy"), ("ref_loss", slice(2, 4), "reference")):
        u = UNIT[CASES[case]["dtypes"].get(kind, "float32") if peer == "sf" else "float32"]
        exact = truth.terms.errors[rows].detach().mean()
        assert (array(case, f"{peer}/{name}").double() - exact).abs() <= (6 * u + 16 * UNIT["float32"]) * exact

    # Where rounding may turn a margin's sign the peer's accuracy may differ; sf also counts a tie as 0, not 0.5.
    undecided = (z.abs() <= rounding.margin) & ((z != 0) | torch.tensor(peer == "sf"))
    accuracy = array(case, f"{peer}/implicit_acc").double()
    assert (accuracy - truth.terms.accuracy.detach().double().mean()).abs() <= undecided.double().mean() + 1e-6

    gradient = array(case, f"{peer}/grad").double()
    if CASES[case]["loss_type"] == "hinge":
        assert ((z - 1).abs() > rounding.margin).all()
    policy, n, pairs = array(case, "policy").double(), array(case, "policy")[0].numel(), z.numel()
    residual = (policy - target_of(case, torch.float64)).abs()
    slope = (rounding.margin / 4).clamp(max=1) * (CASES[case]["loss_type"] == "sigmoid")  # |sigmoid'| <= 1/4
    through_margin = (
        residual * (CASES[case]["beta"] * factor_of(peer) / (n * pairs)) * slope.repeat(2).view(-1, 1, 1, 1)
    )
    target_u = UNIT["float32"] * (CASES[case]["prediction_type"] == "v_prediction") * 16
    stored = UNIT[CASES[case]["dtypes"].get("policy", "float32")]  # a gradient has the dtype of its leaf
    own = 16 * max(rounding.unit, stored) * truth.gradient.abs() + target_u * truth.gradient.abs().max()
    assert ((gradient - truth.gradient).abs() <= through_margin + own + 1e-30).all()


@pytest.mark.parametrize("case", [c for c in range(30) if CASES[c]["loss_type"] in SHAPES])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_our_fp32_margin_is_within_a_thousandth(case, factor):
    exact, single = ours(case, factor=factor), ours(case, torch.float32, factor=factor)
    assert single.terms.logit.dtype == torch.float32
    assert (single.terms.logit.double() - exact.terms.logit).abs().max() < 1e-3
    assert torch.equal(single.terms.accuracy.double(), exact.terms.accuracy)
    torch.testing.assert_close(
        single.gradient.double(), exact.gradient, rtol=2e-3, atol=1e-5 * exact.gradient.abs().max().item()
    )


@pytest.mark.parametrize("case", [20, 22])
def test_half_precision_reference_moves_the_peer_and_not_us(case):
    exact = ours(case).terms.logit
    peer = (array(case, "sf/margin").double() - exact).abs().max()
    assert peer > 0.4
    assert (ours(case, torch.float32).terms.logit.double() - exact).abs().max() < 1e-3
    if case == 22:
        assert peer > 5


def test_half_precision_inputs_are_widened_before_anything_else():
    case = 23  # policy, reference and noise were bfloat16
    narrow = [array(case, name).to(torch.bfloat16) for name in ("policy", "reference", "noise")]
    policy, reference, target = narrow
    assert torch.equal(policy.float(), array(case, "policy"))
    assert sample_errors(policy, target).dtype == torch.float32
    d = pair_difference(policy, reference, target)
    z = -(CASES[case]["beta"] / 2) * d.double()
    assert (z - ours(case).terms.logit).abs().max() < 1e-3


def test_ipo_works_where_the_peer_fails():
    (case,) = (i for i, c in enumerate(CASES) if c["loss_type"] == "ipo")
    assert "AttributeError" in CASES[case]["errors"]["hf-sd15"]
    result = ours(case, factor=2.0)
    errors = result.terms.errors
    h = -((errors[0] - errors[2]) - (errors[1] - errors[3]))
    beta = CASES[case]["beta"]  # z = beta h without the 1/2
    trl = (h - 1 / (2 * beta)) ** 2
    torch.testing.assert_close(result.terms.loss, beta**2 * trl, rtol=1e-9, atol=0)
    assert result.gradient.isfinite().all() and result.gradient.abs().max() > 0


def test_cpo_is_refused_as_unknown():
    (case,) = (i for i, c in enumerate(CASES) if c["loss_type"] == "cpo")
    assert "Unknown loss type" in CASES[case]["errors"]["hf-sd15"]
    assert "cpo" not in SHAPES
    with pytest.raises(UserError, match=r"sigmoid.*hinge.*ipo"):
        validate(from_mapping({"loss": "cpo"}))


# --- the facts of docs/method.md ------------------------------------------------------------------------------------


def sd_schedule(prediction_type: str = "epsilon") -> Schedule:
    return from_scheduler({**SD15, "prediction_type": prediction_type})


def random_errors(pairs: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.002 * torch.rand(4, pairs, generator=generator, dtype=torch.float64).to(dtype)


def timesteps(pairs: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1000, (pairs,), generator=torch.Generator().manual_seed(seed))


NOTHING = torch.zeros(1000, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if "loss" in spec.settings])
def test_policy_equal_to_reference(method, dtype):
    t = timesteps()
    table = tables(method, sd_schedule())
    errors = random_errors(dtype=dtype)
    errors[2:] = errors[:2]
    errors.requires_grad_()
    beta = 2000.0
    prob = torch.ones(64, dtype=dtype)
    soft = pair_terms(errors, t, torch.linspace(0.5, 1, 64), table.weight.to(dtype), NOTHING.to(dtype), beta)
    terms = pair_terms(errors, t, prob, table.weight.to(dtype), NOTHING.to(dtype), beta)
    assert torch.equal(terms.logit.abs(), torch.zeros_like(terms.logit)) and terms.logit.dtype == dtype
    ln2 = -F.logsigmoid(torch.zeros((), dtype=dtype))
    assert abs(ln2.item() - LN2) <= torch.finfo(dtype).eps / 2
    assert torch.equal(terms.loss, ln2.expand(64)) and torch.equal(soft.loss, ln2.expand(64))
    assert torch.equal(terms.accuracy, torch.full((64,), 0.5, dtype=dtype))
    d = (errors[0] - errors[2]) - (errors[1] - errors[3])
    z = logits(d, t, table.weight.to(dtype), NOTHING.to(dtype), beta, prob)
    (slope,) = torch.autograd.grad(z.sum(), errors)
    expected = -(beta / 2) * table.weight[t].to(dtype)
    torch.testing.assert_close(slope, torch.stack([expected, -expected, -expected, expected]))
    (gradient,) = torch.autograd.grad(terms.loss.sum(), errors)
    torch.testing.assert_close(gradient[0], -0.5 * expected)  # sigmoid(0) - 1 = -1/2
    assert (gradient != 0).all()


def test_difference_from_equal_predictions_is_exactly_zero_in_every_dtype():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        policy, target = torch.randn(2, 6, 4, 5, 3, generator=generator, dtype=torch.float64).to(dtype)
        assert torch.equal(
            pair_difference(policy, policy.clone(), target).abs(),
            torch.zeros(3).to(policy.dtype).float().to(torch.promote_types(dtype, torch.float32)),
        )


def test_difference_is_that_of_the_errors():
    generator = torch.Generator().manual_seed(1)
    policy, reference, target = torch.randn(3, 6, 4, 5, 3, generator=generator, dtype=torch.float64)
    pw, pl = sample_errors(policy, target).chunk(2)
    rw, rl = sample_errors(reference, target).chunk(2)
    torch.testing.assert_close(
        pair_difference(policy, reference, target), (pw - rw) - (pl - rl), rtol=1e-12, atol=1e-14
    )
    assert sample_errors(policy, target)[0] == pytest.approx(
        ((policy[0] - target[0]) ** 2).sum().item() / 60, rel=1e-12
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["dpo", "discounted", "dde-single"])
def test_swapping_the_pair_and_the_label_changes_nothing(method, shape):
    t, errors = timesteps(), random_errors()
    prob = torch.linspace(0.0, 1.0, 64, dtype=torch.float64)
    weight = tables(method, sd_schedule()).weight
    one = pair_terms(errors, t, prob, weight, NOTHING, 2000.0, shape)
    other = pair_terms(errors[[1, 0, 3, 2]], t, 1 - prob, weight, NOTHING, 2000.0, shape)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(one.logit, -other.logit)


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if not shape.sides])
def test_a_constant_on_both_reference_errors_changes_nothing(shape):
    t, errors = timesteps(), random_errors()
    table = tables("dde", sd_schedule())
    correction = -0.001 * torch.rand(1000, dtype=torch.float64)
    moved = errors + torch.tensor([0.0, 0.0, 0.25, 0.25], dtype=torch.float64)[:, None]
    args = (t, torch.ones(64, dtype=torch.float64), table.weight, correction, 200.0, shape)
    torch.testing.assert_close(pair_terms(errors, *args).loss, pair_terms(moved, *args).loss, rtol=1e-9, atol=1e-9)


def test_beta_to_zero_gives_ln2():
    t, errors = timesteps(), random_errors()
    losses = [
        pair_terms(errors, t, torch.ones(64), torch.ones(1000), NOTHING, beta).loss.sub(LN2).abs().max().item()
        for beta in (10.0, 1.0, 1e-2, 1e-4)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-6


def test_dde_with_full_memory_is_single_shot():
    schedule = sd_schedule()
    dde, single = tables("dde", schedule), tables("dde-single", schedule)
    assert torch.equal(dde.weight, single.weight) and (dde.precision > 0).all()
    t, errors, prob = timesteps(), random_errors(), torch.ones(64, dtype=torch.float64)
    for rho, same in ((1.0, True), (0.95, False)):
        table = CorrectionTable.zeros(dde.precision, rho, torch.arange(1000), 64)
        for _ in range(5):
            d = pair_terms(errors, t, prob, dde.weight, table.correction(), 200.0).difference
            table.gather(*(torch.zeros(1000, dtype=torch.float64).index_add(0, t, x) for x in (d, torch.ones_like(d))))
            table.commit()
        corrected = pair_terms(errors, t, prob, dde.weight, table.correction(), 200.0).loss
        plain = pair_terms(errors, t, prob, single.weight, NOTHING, 200.0).loss
        assert torch.equal(corrected, plain) is same


def test_kappa_scales_the_correction_alone():
    whole, half = tables("dde", sd_schedule()), tables("dde", sd_schedule(), kappa=0.5)
    assert torch.equal(half.weight, whole.weight) and torch.equal(half.precision, 0.5 * whole.precision)


def test_only_the_methods_with_a_correction_have_step_precisions():
    for name, spec in METHODS.items():
        table = tables(name, sd_schedule())
        assert bool((table.precision > 0).any()) is spec.correction
        assert table.weight.shape == table.precision.shape == (1000,) and table.weight.dtype == torch.float64
    assert torch.equal(tables("dpo", sd_schedule()).weight, torch.ones(1000, dtype=torch.float64))
    assert torch.equal(tables("dde-step", sd_schedule()).weight, torch.ones(1000, dtype=torch.float64))


def test_the_logit_is_its_formula_and_ties_get_no_correction():
    t, errors = timesteps(), random_errors()
    weight, correction = torch.rand(2, 1000, dtype=torch.float64)
    prob = torch.ones(64, dtype=torch.float64)
    prob[:8] = 0.5
    terms = pair_terms(errors, t, prob, weight, correction, 500.0)
    d = (errors[0] - errors[2]) - (errors[1] - errors[3])
    expected = -250.0 * (weight[t] * d + torch.where(prob > 0.5, correction[t], 0.0))
    torch.testing.assert_close(terms.logit, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(terms.accuracy, ((d < 0).double() + 0.5 * (d == 0).double()))


def test_soft_labels_and_their_gradient():
    """d loss / dz = sigmoid(z) - p."""
    errors, t = random_errors(), timesteps()
    prob = torch.linspace(0.5, 1.0, 64, dtype=torch.float64)
    d = ((errors[0] - errors[2]) - (errors[1] - errors[3])).requires_grad_()
    terms = pair_terms(errors, t, prob, torch.ones(1000).double(), NOTHING, 2000.0, difference=d)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), d)
    torch.testing.assert_close(gradient, (torch.sigmoid(terms.logit) - prob) * -1000.0)
    expected = -prob * F.logsigmoid(terms.logit) - (1 - prob) * F.logsigmoid(-terms.logit)
    torch.testing.assert_close(terms.loss, expected)


def test_sft_weight_adds_the_win_images_own_error():
    errors, t = random_errors(), timesteps()
    args = (errors, t, torch.ones(64), torch.ones(1000), NOTHING, 2000.0)
    extra = pair_terms(*args, sft_weight=0.5).loss - pair_terms(*args).loss
    torch.testing.assert_close(extra, 0.5 * errors[0])


def logistic(z):
    return 1 / (1 + torch.exp(-z))


def kl(q, r):
    return q * (q / r).log() + (1 - q) * ((1 - q) / (1 - r)).log()


# f of (z, cw, cl) for a hard label, each as its paper writes it, and the constants that it is tried with.
FORMULAS = {
    "sigmoid": lambda z, cw, cl: torch.log1p(torch.exp(-z)),
    "hinge": lambda z, cw, cl: torch.clamp(1 - z, min=0),
    "ipo": lambda z, cw, cl: (z - 0.5) * (z - 0.5),
    "robust": lambda z, cw, cl, e=0.1: (-(1 - e) * logistic(z).log() + e * logistic(-z).log()) / (1 - 2 * e),
    "apo-zero": lambda z, cw, cl: (1 - logistic(cw)) + logistic(cl),
    "poly": lambda z, cw, cl, a=8.0: -logistic(z).log() + a * (1 - logistic(z)),
    "dmpo": lambda z, cw, cl, a=0.01: kl(logistic(z), torch.tensor(1 - a, dtype=torch.float64)),
    "smpo": lambda z, cw, cl, g=10.0: -logistic(g * z).log(),
}
CONSTANTS = {"robust": 0.25, "poly": -0.5, "dmpo": 0.2, "smpo": 3.0}


@pytest.mark.parametrize("alpha", [None, "its own"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_their_formulas(shape, alpha):
    cw, cl = torch.linspace(-4, 1.3, 101).double(), torch.linspace(2, -1.7, 101).double().flip(0)
    cl = cl[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    z, constant = cw - cl, CONSTANTS.get(shape) if alpha else None
    kind, given = objective.with_alpha(SHAPES[shape], constant), () if constant is None else (constant,)
    more = (cw + cl,) if kind.sides else ()
    for p in (1.0, 0.8, 0.5):
        label = torch.tensor(p, dtype=torch.float64)
        f = FORMULAS[shape]
        expected = p * f(z, cw, cl, *given) + (1 - p) * f(-z, cl, cw, *given)
        if shape == "smpo":  # a soft label is in the scale
            expected = f((2 * p - 1) * z, cw, cl, *given)
        torch.testing.assert_close(kind.loss(z, label, *more), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_begins_at_the_same_loss_whatever_the_label(shape, dtype):
    """Where policy and reference agree each pair's loss is one number in the working precision, but for ipo's ties."""
    errors = random_errors(dtype=dtype)[:2].repeat(2, 1)
    args = (errors, timesteps(), torch.linspace(0.5, 1, 64).to(dtype), torch.ones(1000, dtype=dtype), NOTHING.to(dtype))
    terms = pair_terms(*args, 2000.0, shape)
    start = torch.tensor(methods.SHAPES[shape].start_of().loss, dtype=torch.float64).to(dtype)
    spacing = torch.finfo(dtype).eps * start.abs()
    assert ((terms.loss - start).abs() <= spacing).all(), (terms.loss - start).abs().max()
    if shape in ("sigmoid", "hinge", "ipo", "robust", "apo-zero", "smpo"):
        assert torch.equal(terms.loss, start.expand(64))


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.slope is not None])
def test_slopes_are_the_derivatives_of_their_shapes(shape):
    z = torch.linspace(-4.9, 5, 101, dtype=torch.float64, requires_grad=True)
    p = torch.linspace(0.5, 1, 101, dtype=torch.float64)
    for alpha in {None, CONSTANTS.get(shape)}:
        kind = objective.with_alpha(SHAPES[shape], alpha)
        more = (torch.linspace(3, -2, 101, dtype=torch.float64),) if kind.sides else ()
        (expected,) = torch.autograd.grad(kind.loss(z, p, *more).sum(), z)
        torch.testing.assert_close(kind.slope(z.detach(), p, *more), expected)
        assert torch.autograd.gradcheck(lambda z, kind=kind, more=more: objective.shaped(z, p, kind, *more), z)


def test_where_the_new_shapes_end():
    """dmpo pulls back beyond its aim, robust falls without end, smpo leaves ties alone."""
    z, sure = torch.tensor([-8.0, 4.0, 5.0, 20.0]).double(), torch.ones(()).double()
    assert SHAPES["dmpo"].slope(z, sure).sign().tolist() == [-1, -1, 1, 1]
    assert SHAPES["dmpo"].slope(z[:1], sure).item() == pytest.approx(-0.0042, abs=1e-4)
    assert SHAPES["robust"].slope(z[3:], sure).item() == pytest.approx(-0.1 / 0.8)
    assert SHAPES["smpo"].slope(z, sure / 2).tolist() == [0.0] * 4
    assert torch.equal(objective.with_alpha(SHAPES["poly"], 0.0).loss(z, sure), SHAPES["sigmoid"].loss(z, sure))


def test_apo_zero_gets_its_sides_from_the_errors_and_half_of_the_correction_each():
    errors, t = random_errors(), timesteps()
    weight, correction = torch.rand(2, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = pair_terms(errors, t, torch.ones(64).double(), weight, 1e-3 * correction, 2000.0, "apo-zero")
    cw = -1000 * (weight[t] * (errors[0] - errors[2]) + 1e-3 * correction[t] / 2)
    cl = -1000 * (weight[t] * (errors[1] - errors[3]) - 1e-3 * correction[t] / 2)
    torch.testing.assert_close(terms.loss, FORMULAS["apo-zero"](cw - cl, cw, cl), rtol=1e-10, atol=1e-12)


def test_a_large_logit_does_not_overflow():
    assert SHAPES["sigmoid"].loss(torch.tensor(-1e4), torch.tensor(1.0)).item() == 1e4


def test_ipo_is_trls():
    """TRL: (h - 1/(2 beta))^2 on the log-ratio difference h; here times beta^2, which does not move the minimum."""
    beta, h = 7.0, torch.linspace(-1, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(SHAPES["ipo"].loss(beta * h, torch.ones(())), beta**2 * (h - 1 / (2 * beta)) ** 2)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("mapo", "kto")])
def test_gradcheck(method, shape, direct):
    """From the predictions of three pairs to the loss of each, in float64; `direct`: by the difference that does not
    cancel.
    """
    generator = torch.Generator().manual_seed(3)
    policy, reference, target = torch.randn(3, 6, 2, 2, 3, generator=generator, dtype=torch.float64)
    table = tables(method, sd_schedule())
    spec = METHODS[method]
    correction = 0.3 * torch.rand(1000, generator=generator, dtype=torch.float64) if spec.correction else NOTHING
    t = torch.tensor([50, 400, 700])
    prob = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)
    seen = []

    def losses(prediction):
        errors = torch.stack([*sample_errors(prediction, target).chunk(2), *sample_errors(reference, target).chunk(2)])
        if spec.images == "winner":
            return errors[0]
        d = pair_difference(prediction, reference, target) if direct else None
        terms = pair_terms(errors, t, prob, table.weight, correction, 1.5, shape, sft_weight=0.25, difference=d)
        seen.append(terms.logit)
        return terms.loss

    assert torch.autograd.gradcheck(losses, policy.clone().requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-6)
    if shape == "hinge" and seen:
        assert ((seen[0].abs() - 1).abs() > 1e-3).all()  # away from the kinks, where no derivative exists


@pytest.mark.parametrize("shape", ["sigmoid", "apo-zero"])
@pytest.mark.parametrize("margin", [0.0, 0.6, 1.0])
def test_the_safeguard_bounds_each_losers_gradient_alone(margin, shape):
    """The loser's half of the gradient times min(1, (1 - m) |gw|^2 / (gw . gl)) where gw . gl > 0, pair by pair."""
    generator = torch.Generator().manual_seed(5)
    reference, target = torch.randn(2, 16, 2, 3, 3, generator=generator, dtype=torch.float64)
    policy = reference + 0.1 * torch.randn(16, 2, 3, 3, generator=generator, dtype=torch.float64)
    policy[9] = target[9] + 3 * (policy[1] - target[1])  # along the winner's gradient, and longer
    policy.requires_grad_()
    found = objective.errors_of(policy, reference, target, beta=5.0)
    plain, bounded = (objective.pair_loss(found, shape=shape, safeguard=m) for m in (None, margin))
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, bounded, strict=True)
    )  # every value, of the loss too
    whole, less = (torch.autograd.grad(t.loss.sum(), policy, retain_graph=True)[0] for t in (plain, bounded))
    win, lose = (policy - target).detach().flatten(1).chunk(2)
    product = (win * lose).sum(1)
    factor = torch.where(product > 0, ((1 - margin) * (win * win).sum(1) / product).clamp(max=1), 1.0)
    assert (product > 0).any() and (product < 0).any() and factor[1] == pytest.approx(min(1.0, (1 - margin) / 3))
    expected = whole * torch.cat([torch.ones(8).double(), factor])[:, None, None, None]
    torch.testing.assert_close(less, expected, rtol=1e-10, atol=1e-14)
    if (
        shape == "sigmoid"
    ):  # a step along the whole gradient lowers the winner's error: gw . (gw - factor gl) >= m |gw|^2
        assert ((win * (win - factor[:, None] * lose)).sum(1) >= (margin - 1e-12) * (win * win).sum(1)).all()


def test_mapo_is_its_formula_and_needs_no_reference():
    generator = torch.Generator().manual_seed(7)
    policy, target = torch.randn(2, 6, 2, 2, 3, generator=generator, dtype=torch.float64)
    p, odds = torch.tensor([1.0, 0.8, 0.5]).double(), objective.Odds(0.3, 0.7)
    t, ones, zeros = torch.zeros(3, dtype=torch.int64), torch.ones(3).double(), torch.zeros(1).double()

    def terms(prediction):
        found = pair_errors(prediction, t, p, ones, zeros + 1, zeros, 1.0, target=target)
        return objective.pair_loss(found, p, shape=None, odds=odds)

    def f(win, lose):
        phi_win, phi_lose = (0.7 * x / (torch.exp(0.7 * x) - 1) for x in (win, lose))
        return win - 0.3 * F.logsigmoid(1000 * (phi_win - phi_lose))

    win, lose = sample_errors(policy, target).chunk(2)
    found = terms(policy)
    torch.testing.assert_close(found.loss, p * f(win, lose) + (1 - p) * f(lose, win), rtol=1e-10, atol=1e-12)
    assert all(x.isnan().all() for x in (found.logit, found.difference, found.accuracy, found.pull, found.errors[2:]))
    near = (target + 0.1 * torch.randn(target.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: terms(x).loss, near)


def test_the_penalty_on_larger_predictions_is_its_formula():
    generator = torch.Generator().manual_seed(11)
    policy, reference, target = torch.randn(3, 6, 2, 3, 3, generator=generator, dtype=torch.float64)
    policy[2], policy[4] = 0.0, 1.5 * reference[4]

    def loss(prediction, weight=0.7):
        found = objective.errors_of(prediction, reference, target, beta=5.0)
        return objective.pair_loss(found._replace(sizes=objective.sizes_of(prediction, reference)), norm_penalty=weight)

    def norm(x):
        return x.square().flatten(1).mean(1).sqrt()

    over = (norm(policy) - norm(reference)).clamp(min=0)
    assert over[4] > 0.2 and over[2] == 0
    expected = loss(policy, 0.0).loss + 0.7 * (over[:3] + over[3:]) / 2
    torch.testing.assert_close(loss(policy).loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss(policy).sizes[0], (norm(policy)[:3] + norm(policy)[3:]) / 2)
    assert torch.autograd.gradcheck(lambda x: loss(x).loss, policy[:].where(policy != 0, 0.1).requires_grad_())
    zero = torch.zeros_like(policy).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.excess(objective.sizes_of(zero, zero.detach())).sum(), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))  # and not nan
    assert torch.equal(loss(reference).loss, loss(reference, 0.0).loss)


@pytest.mark.parametrize("liked, disliked", [(1.0, 1.0), (1.5, 0.25)])
@pytest.mark.parametrize("center", [0.0, 0.4, "batch"])
def test_kto_is_its_formula(center, liked, disliked):
    """w (1 - s(+-beta ((R - L) - max(mean(R - L), 0)))) of each image by its own label, the mean over both of a pair."""
    generator = torch.Generator().manual_seed(13)
    reference, target = torch.randn(2, 8, 2, 2, 3, generator=generator, dtype=torch.float64)
    policy = reference + 0.2 * (target - reference) + 0.1 * torch.randn(8, 2, 2, 3, generator=generator).double()
    p, usable, beta = torch.tensor([1.0, 1.0, 0.8, 1.0]).double(), torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), 2.5
    given = center if isinstance(center, str) else torch.tensor(center).double()

    def loss(prediction):
        found = objective.errors_of(prediction, reference, target, beta=2 * beta)
        return objective.pair_loss(found, p, usable, shape=None, kto=objective.Kto(given, liked, disliked)).loss

    gain = sample_errors(reference, target) - sample_errors(policy, target)
    middle = gain.view(2, 4)[:, :3].mean().clamp(min=0) * beta if given == "batch" else given
    assert middle > 0 or center == 0.0
    like, dislike = (w * (1 - torch.sigmoid(sign * (beta * gain - middle))) for w, sign in ((liked, 1), (disliked, -1)))
    like_win, like_lose, dislike_win, dislike_lose = *like.chunk(2), *dislike.chunk(2)
    expected = (p * (like_win + dislike_lose) + (1 - p) * (dislike_win + like_lose)) / 2
    torch.testing.assert_close(loss(policy), torch.where(usable > 0, expected, 0.0), rtol=1e-10, atol=1e-12)
    if center != "batch":  # no gradient goes through the centre, which a numerical one would see
        assert torch.autograd.gradcheck(loss, policy.requires_grad_())
    assert torch.equal(loss(reference)[:3], torch.full((3,), 0.5).double()) or center == 0.4 or liked != 1.0


@pytest.mark.parametrize("center", [0.0, 0.4, "batch"])
def test_kto_of_images_alone_is_its_formula_and_their_figures_are_turned_to_their_labels(center):
    generator = torch.Generator().manual_seed(13)
    reference, target = torch.randn(2, 4, 2, 2, 3, generator=generator, dtype=torch.float64)
    policy = reference + 0.2 * (target - reference) + 0.1 * torch.randn(4, 2, 2, 3, generator=generator).double()
    p, usable, beta = torch.tensor([1.0, 0.0, 0.8, 0.5]).double(), torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), 2.5
    weights = objective.Kto(center if isinstance(center, str) else torch.tensor(center).double(), 1.5, 0.25)

    def terms(prediction):
        twice = [torch.cat([x, torch.zeros_like(x)]) for x in (prediction, reference, target)]
        found = objective.errors_of(*twice, beta=2 * beta)
        live = found._replace(difference=found.difference * usable, errors=found.errors * usable)
        return objective.pair_loss(live, p, usable, shape=None, kto=weights, single=True)

    gain = sample_errors(reference, target) - sample_errors(policy, target)
    middle = (beta * gain[:3]).mean().clamp(min=0) if center == "batch" else weights.center
    x, found = beta * gain - middle, terms(policy)
    expected = 1.5 * p * (1 - torch.sigmoid(x)) + 0.25 * (1 - p) * (1 - torch.sigmoid(-x))
    torch.testing.assert_close(found.loss, expected * usable, rtol=1e-10, atol=1e-12)
    sign = torch.tensor([1.0, -1.0, 1.0, 0.0]).double()
    torch.testing.assert_close(found.logit, sign * x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.difference, -sign * gain, rtol=1e-9, atol=1e-12)
    assert found.accuracy.tolist() == [float(sign[i] * x[i] > 0) for i in range(3)] + [0.0]
    pull = (1.5 * p - 0.25 * (1 - p)).abs() * torch.sigmoid(x) * torch.sigmoid(-x) * usable
    torch.testing.assert_close(found.pull, pull, rtol=1e-9, atol=1e-12)
    policy_errors = found.errors[:2]
    assert policy_errors.isnan().tolist() == [[False, True, False, False], [True, False, True, False]]
    torch.testing.assert_close(policy_errors.nansum(0), sample_errors(policy, target) * usable)
    if center != "batch":
        assert torch.autograd.gradcheck(lambda prediction: terms(prediction).loss, policy.requires_grad_())


def test_no_other_loss_takes_images_alone():
    found = objective.errors_of(*torch.randn(3, 4, 1, 2, 2).unbind(), beta=2.0)
    with pytest.raises(AssertionError, match="compare two images"):
        objective.pair_loss(found, single=True)


def test_mapo_keeps_its_digits_at_small_errors():
    """e^x - 1 in fp32 is off by 5 % at 1e-6, 1000 times which would be the margin."""
    win, lose = torch.tensor([1e-6, 3e-3, 0.0]), torch.tensor([2e-6, 1e-3, 1e-8])
    sure, odds = torch.ones(3), objective.Odds()
    single = objective.odds_loss(win, lose, sure, odds)
    exact = objective.odds_loss(win.double(), lose.double(), sure.double(), odds)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


def test_the_loss_from_predictions_alone_is_that_of_the_oracle():
    generator = torch.Generator().manual_seed(3)
    policy, reference = (torch.randn(6, 4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = torch.randn(3, 4, 5, 3, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    terms = objective.pair_loss(objective.errors_of(policy, reference, noise, beta=500.0))
    target = noise.repeat(2, 1, 1, 1)
    d = pair_difference(policy, reference, target)
    torch.testing.assert_close(terms.loss, F.softplus(250 * d), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), policy)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.softplus(250 * d).sum(), policy)[0], rtol=1e-10, atol=0)
    same = objective.pair_loss(objective.errors_of(reference, reference, noise, beta=500.0))
    assert same.loss.tolist() == [pytest.approx(LN2, rel=1e-15)] * 3 and same.logit.tolist() == [0.0] * 3
    soft = objective.pair_loss(objective.errors_of(policy, reference, noise, beta=500.0), torch.full((3,), 0.75))
    torch.testing.assert_close(soft.loss, 0.75 * F.softplus(250 * d) + 0.25 * F.softplus(-250 * d), rtol=1e-12, atol=0)

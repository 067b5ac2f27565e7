"""The methods' losses: from the errors, difference and logit of each pair to its loss.

Training runs this file; change an objective here. One loss, several credit assignments (docs/method.md; Diffusion-DPO:
Wallace et al., arXiv 2311.12908, eq. 14; DDE: Shi et al., arXiv 2411.14871; discounted: Yang et al., arXiv 2402.08265):

    d    = (Lw - Rw) - (Ll - Rl)                       training wants d < 0
    z    = -(beta/2) (weight(t) d + correction(t))     weight, correction: credit.py, correction.py
    loss = p f(z) + (1 - p) f(-z) + sft_weight Lw      f: the shape, below

L and R are the mean squared errors of policy and reference, w and l the win and lose image. d and z need every element
of the predictions and come from one fused pass, csrc_triton/pair_errors.py. This file is plain torch on B numbers,
differentiable in z, d and the errors, in any float dtype; a new objective needs no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from csrc_triton.pair_errors import PairErrors, pair_errors


class Shape(NamedTuple):
    """The shape of a pairwise loss, from the logit z [B] and the label p [B] in [1/2, 1] to a loss [B].

    `slope` is the derivative by z, given where autograd's own would lose digits or cost a second pass; None leaves it to
    autograd. `sides`: the loss is not of z = cw - cl alone but of both, and takes cw + cl [B] as a third number.
    """

    loss: Callable[..., Tensor]
    slope: Callable[..., Tensor] | None = None
    sides: bool = False


def sigmoid(z: Tensor, p: Tensor) -> Tensor:
    """f(z) = log(1 + e^-z), so that p f(z) + (1 - p) f(-z) = (1 - p) z + f(z): exactly ln 2 at z = 0 whatever p."""
    return (1 - p) * z - F.logsigmoid(z)


def sigmoid_slope(z: Tensor, p: Tensor) -> Tensor:
    """The derivative of `sigmoid` by z: s(z) - p, with s the logistic function.

    For z >= 0 it is computed as (1 - p) - s(-z), which keeps its digits where s(z) rounds to 1.
    """
    small = torch.sigmoid(-z.abs())
    return torch.where(z >= 0, (1 - p) - small, small - p)


def hinge(z: Tensor, p: Tensor) -> Tensor:
    """f(z) = max(0, 1 - z)."""
    return p * F.relu(1 - z) + (1 - p) * F.relu(1 + z)


def hinge_slope(z: Tensor, p: Tensor) -> Tensor:
    """The derivative of `hinge` by z; 0 at its kinks."""
    return (1 - p) * (z > -1) - p * (z < 1)


def ipo(z: Tensor, p: Tensor) -> Tensor:
    """f(z) = (z - 1/2)^2, Azar et al. 2023 (arXiv 2310.12036).

    With z = beta h this is TRL's (h - 1/(2 beta))^2 times beta^2.
    """
    return p * (z - 0.5) ** 2 + (1 - p) * (z + 0.5) ** 2


def ipo_slope(z: Tensor, p: Tensor) -> Tensor:
    """The derivative of `ipo` by z."""
    return 2 * z + (1 - 2 * p)


def robust(z: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    """((1 - e) f(z) - e f(-z)) / (1 - 2 e), f = -logsigmoid, e = alpha: the share of labels that are the wrong way round.

    Chowdhury et al. 2024 (arXiv 2403.00409). f(-z) = f(z) + z makes it `sigmoid` with a p above 1. Unbounded below: the
    slope for large z is -e / (1 - 2 e).
    """
    return sigmoid(z, unflipped(p, alpha))


def robust_slope(z: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    """The derivative of `robust` by z."""
    return sigmoid_slope(z, unflipped(p, alpha))


def unflipped(p: Tensor, flipped: float) -> Tensor:
    """The label of which `p` is what remains when a share `flipped` of labels is turned round: outside [0, 1]."""
    return p + flipped / (1 - 2 * flipped) * (2 * p - 1)


def poly(z: Tensor, p: Tensor, alpha: float = 8.0) -> Tensor:
    """f(z) + a (1 - s(z)), f = -logsigmoid, a = alpha (arXiv 2604.24953); a = 0 is `sigmoid`."""
    return sigmoid(z, p) + alpha * (p * torch.sigmoid(-z) + (1 - p) * torch.sigmoid(z))


def poly_slope(z: Tensor, p: Tensor, alpha: float = 8.0) -> Tensor:
    """The derivative of `poly` by z."""
    return sigmoid_slope(z, p) + alpha * (1 - 2 * p) * torch.sigmoid(z) * torch.sigmoid(-z)


def dmpo(z: Tensor, p: Tensor, alpha: float = 0.01) -> Tensor:
    """KL(Bernoulli(s(z)) || Bernoulli(1 - a)), a = alpha (arXiv 2507.07510): least at z = log((1 - a) / a)."""
    entropy = torch.sigmoid(z) * F.logsigmoid(z) + torch.sigmoid(-z) * F.logsigmoid(-z)
    right = p * torch.sigmoid(z) + (1 - p) * torch.sigmoid(-z)
    wrong = p * torch.sigmoid(-z) + (1 - p) * torch.sigmoid(z)
    return entropy - right * math.log1p(-alpha) - wrong * math.log(alpha)


def dmpo_slope(z: Tensor, p: Tensor, alpha: float = 0.01) -> Tensor:
    """The derivative of `dmpo` by z."""
    aim = math.log1p(-alpha) - math.log(alpha)
    return torch.sigmoid(z) * torch.sigmoid(-z) * (z - (2 * p - 1) * aim)


def smpo(z: Tensor, p: Tensor, alpha: float = 10.0) -> Tensor:
    """-logsigmoid(g (2 p - 1) z), g = alpha: a soft label scales its pair's logit, and is not weighed in again."""
    return -F.logsigmoid(alpha * (2 * p - 1) * z)


def smpo_slope(z: Tensor, p: Tensor, alpha: float = 10.0) -> Tensor:
    """The derivative of `smpo` by z."""
    scale = alpha * (2 * p - 1)
    return -scale * torch.sigmoid(-scale * z)


def apo_zero(z: Tensor, p: Tensor, both: Tensor) -> Tensor:
    """(1 - s(cw)) + s(cl) with cw - cl = z, cw + cl = `both`, D'Oosterlinck et al. 2024 (arXiv 2408.06266).

    Its minimum makes winners likelier than under the reference and losers less likely, not only their difference.
    """
    win, lose = torch.sigmoid((both + z) / 2), torch.sigmoid((both - z) / 2)
    return 1 - (2 * p - 1) * (win - lose)


def apo_zero_slope(z: Tensor, p: Tensor, both: Tensor) -> Tensor:
    """The derivative of `apo_zero` by z."""
    win, lose = (both + z) / 2, (both - z) / 2
    bend = torch.sigmoid(win) * torch.sigmoid(-win) + torch.sigmoid(lose) * torch.sigmoid(-lose)
    return (0.5 - p) * bend


# Each is in methods.SHAPES too, which --loss and the report read without importing torch.
SHAPES = {
    "sigmoid": Shape(sigmoid, sigmoid_slope),
    "hinge": Shape(hinge, hinge_slope),
    "ipo": Shape(ipo, ipo_slope),
    "robust": Shape(robust, robust_slope),
    "apo-zero": Shape(apo_zero, apo_zero_slope, sides=True),
    "poly": Shape(poly, poly_slope),
    "dmpo": Shape(dmpo, dmpo_slope),
    "smpo": Shape(smpo, smpo_slope),
}


def with_alpha(shape: Shape, alpha: float | None) -> Shape:
    """`shape` with its constant set; None leaves its default, and shapes without one take None alone."""
    if alpha is None:
        return shape
    slope = None if shape.slope is None else partial(shape.slope, alpha=alpha)
    return shape._replace(loss=partial(shape.loss, alpha=alpha), slope=slope)


class Kto(NamedTuple):
    """What KTO's loss is made with beside beta."""

    center: Tensor | str  # 0-d, in units of the logit; or "batch" for `centre_of`
    liked: float = 1.0  # weights
    disliked: float = 1.0


def kto(z: Tensor, p: Tensor, both: Tensor, liked: float = 1.0, disliked: float = 1.0) -> Tensor:
    """The mean of `kto_image` over both images of a pair, of cw - c with p and of cl - c with 1 - p; `both` = cw + cl - 2 c.

    Diffusion-KTO, Li et al. 2024 (arXiv 2404.04465), with c its centre. With weights of 1 it is half of `apo_zero`.
    """
    win, lose = torch.sigmoid((both + z) / 2), torch.sigmoid((both - z) / 2)
    return 0.5 * (liked - (p * liked - (1 - p) * disliked) * (win - lose) - (liked - disliked) * lose)


def kto_slope(z: Tensor, p: Tensor, both: Tensor, liked: float = 1.0, disliked: float = 1.0) -> Tensor:
    """The derivative of `kto` by z."""
    win, lose = (torch.sigmoid(x) * torch.sigmoid(-x) for x in ((both + z) / 2, (both - z) / 2))
    return 0.25 * ((liked - disliked) * lose - (p * liked - (1 - p) * disliked) * (win + lose))


def kto_image(x: Tensor, p: Tensor, liked: float = 1.0, disliked: float = 1.0) -> Tensor:
    """Of an image alone, liked with probability p in [0, 1], from its logit x = beta (R - L) - c: w (1 - s(+-x))."""
    return p * liked * torch.sigmoid(-x) + (1 - p) * disliked * torch.sigmoid(x)


def kto_image_slope(x: Tensor, p: Tensor, liked: float = 1.0, disliked: float = 1.0) -> Tensor:
    """The derivative of `kto_image` by x."""
    return ((1 - p) * disliked - p * liked) * torch.sigmoid(x) * torch.sigmoid(-x)


def kto_shape(weights: Kto, *, single: bool) -> Shape:
    """KTO's loss with its weights: of pairs, or of images alone."""
    _, liked, disliked = weights
    loss, by_z = (
        partial(of, liked=liked, disliked=disliked)
        for of in ((kto_image, kto_image_slope) if single else (kto, kto_slope))
    )
    return Shape(loss, by_z, sides=not single)


def centre_of(gains: Tensor, live: Tensor) -> Tensor:
    """KTO's centre from the logits of a micro-batch's images [B], as its authors take it: their mean, at least 0.

    Of pairs each number is the mean of both images.
    """
    shares = torch.where(live, gains.detach(), 0.0)
    return (shares.sum() / live.sum().clamp_min(1)).clamp_min(0)


class Odds(NamedTuple):
    """The constants of MaPO's loss."""

    weight: float = 0.1  # b
    scale: float = 0.5  # s


def odds_loss(win: Tensor, lose: Tensor, p: Tensor, odds: Odds) -> Tensor:
    """Lw - b logsigmoid(1000 (phi(Lw) - phi(Ll))), phi(x) = s x / (e^(s x) - 1), from the policy's errors [B]: no reference.

    MaPO, Hong et al. 2024 (arXiv 2406.06424); for a label p the mean over both orders.
    """
    margin = 1000 * (_falling(odds.scale * win) - _falling(odds.scale * lose))
    return p * win + (1 - p) * lose + odds.weight * sigmoid(margin, p)


def _falling(x: Tensor) -> Tensor:
    """x / (e^x - 1) for x >= 0, 1 at 0. expm1: e^x - 1 is off by 5 % at 1e-6 in fp32."""
    small = x.clamp_min(torch.finfo(x.dtype).tiny)
    return small / torch.expm1(small)


class PairTerms(NamedTuple):
    """B pairs of a micro-batch, in fp32, or float64 for a float64 policy; or B images alone, each with a label.

    A hole is 0 in all but `timesteps` and counts nowhere. Only `loss` is differentiated. Of an image alone logit and
    difference are turned so that they mean the same, the logit is that over the centre, and the errors are those of the
    win side where it is liked, else of the lose side; the others are nan.
    """

    loss: Tensor  # [B]
    logit: Tensor  # [B] z: positive when the policy prefers the winner
    difference: Tensor  # [B] d: negative when the policy prefers the winner
    errors: Tensor  # [4, B]: policy win, policy lose, reference win, reference lose
    accuracy: Tensor  # [B]: 1 where d < 0, 0.5 where d == 0, else 0
    pull: Tensor  # [B]: |d loss / d z|; nan without a pairwise loss
    sizes: Tensor  # [2, B]: root mean square of the predictions of policy and reference, over both images; nan if not taken
    timesteps: Tensor  # [B] int64
    table_sum: Tensor  # [T]: sum of d over the usable pairs with p > 1/2 at each timestep, for DDE's table
    table_count: Tensor  # [T]: number of those pairs


def errors_of(policy: Tensor, reference: Tensor, target: Tensor, *, beta: float) -> PairErrors:
    """Errors, difference and logit of B pairs from predictions made anywhere; gradients flow into `policy`.

    policy, reference [2B, C, H, W]: predictions, the preferred images first; target [2B, C, H, W], or [B, C, H, W]
    where both images of a pair share their noise, as they should. beta multiplies the mean squared error, as published
    (2000, 5000). Every timestep counts alike: weights and corrections by timestep are the business of PairStep. Raises
    AssertionError for other shapes.
    """
    pairs, device = policy.shape[0] // 2, policy.device
    ones, zeros = torch.ones(pairs, device=device), torch.zeros(1, device=device)
    t = torch.zeros(pairs, dtype=torch.int64, device=device)
    strength = torch.tensor(beta, device=device)
    return pair_errors(policy, t, ones, ones, zeros + 1, zeros, strength, reference=reference, target=target)


def pair_loss(
    found: PairErrors,
    prob: Tensor | None = None,
    usable: Tensor | None = None,
    timesteps: Tensor | None = None,
    *,
    shape: str | None = "sigmoid",
    sft_weight: float = 0.0,
    alpha: float | None = None,
    safeguard: float | None = None,
    odds: Odds | None = None,
    norm_penalty: float = 0.0,
    kto: Kto | None = None,
    single: bool = False,
) -> PairTerms:
    """The loss of each pair, with the numbers that metrics and DDE's table take from it.

    prob [B] in [1/2, 1]: probability that "win" is preferred (1 hard label, 0.5 tie, 1 - s under label smoothing);
    usable [B]: 0 marks a hole; timesteps [B] int64. Where they are left out labels are hard, no pair is a hole, and the
    timesteps 0. `shape` names one of SHAPES; None is supervised training: the loss is the preferred image's own error.
    `sft_weight` adds that error to a pairwise loss; `alpha` is the shape's constant, None its default;
    `safeguard` bounds the losers' gradients (`safeguarded`). `odds`: MaPO's loss in the place of a pairwise one.
    `norm_penalty`: weight of what the policy's predictions are larger than the reference's (`excess`).
    `kto`: KTO's loss in the place of another. With `single` it is of images without a partner: `found` has each on the
    win side, with nothing on the other, and prob [B] in [0, 1] is the probability that it is liked.
    """
    prob = torch.ones_like(found.difference) if prob is None else prob
    usable = torch.ones_like(found.difference) if usable is None else usable
    timesteps = torch.zeros_like(found.difference, dtype=torch.int64) if timesteps is None else timesteps
    live = usable > 0
    win = found.errors[0]
    assert kto is not None or not single, "the other losses compare two images"
    if odds is not None or (shape is None and kto is None):
        pull = torch.where(live, torch.nan, torch.zeros_like(win))  # as all that needs a reference, or is of two images
        lose = found.errors[1]
        loss = win if odds is None else odds_loss(win, lose, prob.to(win.dtype), odds)
        found = found._replace(logit=pull, difference=pull, errors=torch.stack((win, lose, pull, pull)))
    else:
        p = prob.to(found.logit.dtype)
        found = found if safeguard is None else safeguarded(found, safeguard)
        if kto is None:
            assert shape is not None, "what else there is"
            kind = with_alpha(SHAPES[shape], alpha)
        else:
            kind = kto_shape(kto, single=single)
        z, more = found.logit, [summed(found)] if kind.sides else []
        if kto is not None:
            gains = z if single else more[0] / 2
            center = kto.center if isinstance(kto.center, Tensor) else centre_of(gains, live)
            z, more = (z - center, more) if single else (z, [more[0] - 2 * center])
        loss = shaped(z, p, kind, *more)
        wide = (part.detach().double() for part in (z, p, *more))  # fp32 would show how a batch was cut
        pull = slope(kind, *wide).abs().to(loss.dtype)
        if sft_weight:
            loss = loss + sft_weight * win
        found = turned(found, z, p > 0.5, live) if single else found
    sizes = found.sizes
    if norm_penalty:
        assert sizes is not None, "a penalty on the predictions' size needs those of the reference"
        loss = loss + norm_penalty * excess(sizes)
    taken = (
        torch.full_like(found.errors[:2], torch.nan) if sizes is None else sizes.detach().unflatten(1, (2, -1)).mean(1)
    )
    accuracy = torch.where(live, implicit_accuracy(-found.logit.detach() if single else found.difference.detach()), 0.0)
    return PairTerms(
        torch.where(live, loss, 0.0),
        found.logit.detach(),
        found.difference.detach(),
        found.errors.detach(),
        accuracy,
        torch.where(live, pull.detach(), 0.0),
        torch.where(live, taken.to(found.errors.dtype), 0.0),
        timesteps,
        found.table_sum,
        found.table_count,
    )


def turned(found: PairErrors, x: Tensor, liked: Tensor, live: Tensor) -> PairErrors:
    """`found` of images alone as PairTerms has it; x [B]: their logits over the centre, liked, live [B] bool."""
    policy, _, reference, _ = found.errors
    sides = [torch.where(side, one, torch.nan) for one in (policy, reference) for side in (liked, ~liked)]
    return found._replace(
        logit=torch.where(live, torch.where(liked, x, -x), 0.0),
        difference=torch.where(liked, found.difference, -found.difference),
        errors=torch.where(live, torch.stack(sides), 0.0),
    )


def sizes_of(policy: Tensor, reference: Tensor) -> Tensor:
    """[2, 2B]: root mean squares over C, H, W of predictions [2B, C, H, W], in fp32 or wider; gradient 0 where one is 0."""
    wide = torch.promote_types(policy.dtype, torch.float32)
    rows = [torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide) for x in (policy, reference)]
    return torch.stack(rows) / math.sqrt(policy[0].numel())


def excess(sizes: Tensor) -> Tensor:
    """max(0, |policy| - |reference|) [B], the mean over both images; sizes [2, 2B] as of `sizes_of`."""
    policy, reference = sizes
    return F.relu(policy - reference.detach()).unflatten(0, (2, -1)).mean(0)


def safeguarded(found: PairErrors, margin: float) -> PairErrors:
    """`found` with the gradient by each loser's error times min(1, (1 - m) |gw|^2 / (gw . gl)), m = `margin` in [0, 1].

    1 where gw . gl <= 0. gw and gl are the gradients of the two errors by the prediction, so that a step along both does
    not raise the winner's error to first order (Diffusion-SDPO, arXiv 2511.03317). No value changes. The published code
    takes one factor for a micro-batch; here each pair has its own.
    """
    win, lose = found.errors[:2]
    bound = (1 - margin) * win.detach() / found.product
    factor = torch.where(found.product > 0, bound.clamp(max=1.0), 1.0)
    moved = (factor - 1) * (lose - lose.detach())  # 0, with the gradient that goes
    zero = torch.zeros_like(moved)
    return found._replace(
        logit=found.logit - found.gain * moved,
        difference=found.difference - moved,
        errors=found.errors + torch.stack((zero, moved, zero, zero)),
    )


def summed(found: PairErrors) -> Tensor:
    """cw + cl [B], cw = -(beta/2) (weight(t) (Lw - Rw) + C(t)/2) and cl = -(beta/2) (weight(t) (Ll - Rl) - C(t)/2)."""
    policy_win, policy_lose, reference_win, reference_lose = found.errors
    return found.gain * ((policy_win - reference_win) + (policy_lose - reference_lose))


def shaped(z: Tensor, p: Tensor, shape: Shape, *more: Tensor) -> Tensor:
    """The loss [B] of `shape` from z [B] and p [B]; its backward uses the shape's slope where z is all that it is of."""
    return shape.loss(z, p, *more) if shape.slope is None or more else _WithSlope.apply(z, p, shape)


def slope(shape: Shape, z: Tensor, p: Tensor, *more: Tensor) -> Tensor:
    """The derivative [B] of the loss of `shape` by z [B], for p [B]: how strongly each pair pulls at the policy."""
    if shape.slope is not None:
        return shape.slope(z, p, *more)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(shape.loss(z, p, *more).sum(), z)[0]


class _WithSlope(torch.autograd.Function):
    """A shape's loss whose derivative by z is the shape's slope."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, p: Tensor, shape: Shape) -> Tensor:
        assert shape.slope is not None
        ctx.save_for_backward(shape.slope(z, p))
        return shape.loss(z, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def implicit_accuracy(d: Tensor) -> Tensor:
    """1 where the policy moved towards the win image (d < 0), 0.5 where d == 0, nan where it is nan, else 0: [B]."""
    return torch.where(d.isnan(), d, (d < 0).to(d.dtype) + 0.5 * (d == 0).to(d.dtype))

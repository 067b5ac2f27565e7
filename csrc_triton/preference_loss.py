"""The preference loss of every pair: four errors, difference, logit, loss and table sums in one launch; its gradient in another.

    e(x)  = mean over C, H, W of (model(x_t, t) - target)^2                        DDPM, Ho et al. 2020, eq. 14
    d     = (e_policy(w) - e_ref(w)) - (e_policy(l) - e_ref(l))                    Diffusion-DPO, Wallace et al. 2024, eq. 14
    z     = -(beta/2) (weight(t) d + correction(t)),  correction 0 where p = 1/2   DDE, Shi et al. 2024 (arXiv 2411.14871)
    loss  = p f(z) + (1 - p) f(-z) + sft_weight e_policy(w)
    f(z)  = log(1 + e^-z) (sigmoid), max(0, 1 - z) (hinge), (z - 1/2)^2 (ipo)

d is not taken from rounded errors but from the sum over elements of (p - r)(p + r - 2 target), win minus lose: exactly 0 where
policy and reference agree, and free of cancellation. Then z is exactly 0 and, as the sigmoid loss is evaluated as log(1 + e^-z)
+ (1 - p) z, each loss is exactly ln 2 whatever p. With recorded reference errors d is formed from the four means.

Gradient: d loss / d policy = slope grad (2 / n) (policy - target), n = C H W, slope(w) = dloss/dz (-(beta/2) weight(t)) +
sft_weight, slope(l) = dloss/dz (beta/2) weight(t). For the sigmoid dloss/dz = sigmoid(z) - p, for z >= 0 as
(1 - p) - sigmoid(-z), which keeps its digits where sigmoid(z) rounds to 1. The slopes are saved by the forward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from csrc_triton.latents import addressable, empty_like
from csrc_triton.noising import pair_noise, signal_and_spread
from csrc_triton.philox import seed_tensor
from csrc_triton.preference_kernels import (
    BLOCK,
    PAIR_TILE,
    REGISTERS,
    WARPS,
    preference_loss_backward_kernel,
    preference_loss_kernel,
)
from csrc_triton.runtime import PINNED, registers, runs_triton, wide

SHAPES = ("sigmoid", "hinge", "ipo")
TERMS = 9  # rows: logit, difference, policy win, policy lose, reference win, reference lose, accuracy, slope win, slope lose


class PreferenceLoss(NamedTuple):
    """What `preference_loss` returns: fp32, or float64 for a float64 policy. Only `loss` is differentiable. Holes are 0
    everywhere.
    """

    loss: torch.Tensor  # [B], soft label and sft_weight included, not reduced
    logit: torch.Tensor  # [B] z
    difference: torch.Tensor  # [B] d
    errors: torch.Tensor  # [4, B]: policy win, policy lose, reference win, reference lose
    accuracy: torch.Tensor  # [B]: 1 where d < 0, 0.5 where d == 0, else 0
    table_sum: torch.Tensor  # [T]: sum of d over the usable pairs with p > 1/2 at each timestep
    table_count: torch.Tensor  # [T]: their number


class Source(NamedTuple):
    """Where the target comes from: given, or the noise of (keys, draws, seed), which with latents and abar makes the v target."""

    target: torch.Tensor | None  # [B or 2B, C, H, W]
    latents: torch.Tensor | None  # [2B, C, H, W]
    alphas: torch.Tensor | None  # [T]
    keys: torch.Tensor | None  # [B] int64
    draws: torch.Tensor | None  # [B] int64
    seed: torch.Tensor | None  # [] int64

    def launch_arguments(self, batch: int) -> tuple[tuple, dict]:
        """(the six pointers, the constexprs that say what they are)."""
        target, target_last = addressable(self.target) if self.target is not None else (None, False)
        latents, latents_last = addressable(self.latents) if self.latents is not None else (None, False)
        flags = {
            "SOURCE": 0 if target is not None else 2 if latents is not None else 1,
            "SHARED": target is not None and target.shape[0] == batch,
            "TARGET_LAST": target_last,
            "LATENTS_LAST": latents_last,
        }
        return (target, latents, self.alphas, self.keys, self.draws, self.seed), flags

    def tensor(self, policy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target [2B, C, H, W] in fp32 or float64, in plain torch."""
        if self.target is not None:
            return wide(self.target) if self.target.shape == policy.shape else wide(self.target).repeat(2, 1, 1, 1)
        dtype = wide(policy).dtype
        noise = pair_noise(self.keys, self.draws, self.seed, tuple(policy.shape[1:]), dtype).repeat(2, 1, 1, 1)
        if self.latents is None or self.alphas is None:
            return noise
        signal, spread = (x.repeat(2, 1, 1, 1) for x in signal_and_spread(self.alphas, timesteps, dtype))
        return signal * noise - spread * self.latents.to(dtype)


# -------------------------------------------------------------------------------------------------------------------- launchers


def _launch_forward(
    policy, reference, recorded, source: Source, timesteps, prob, usable, weight, correction, beta, shape: str, sft_weight: float
):
    """(loss [B], terms [9, B], tables [2, T]) in fp32. One kernel; the ticket's four bytes are zeroed before it."""
    policy, policy_last = addressable(policy)
    reference, reference_last = addressable(reference) if reference is not None else (None, False)
    samples, channels, height, width = policy.shape
    batch, elements, length = samples // 2, channels * height * width, weight.shape[0]
    splits = triton.cdiv(elements, BLOCK)
    splits_block = triton.next_power_of_2(splits)
    floats = {"dtype": torch.float32, "device": policy.device}
    loss, terms, tables = torch.empty(batch, **floats), torch.empty(TERMS, batch, **floats), torch.empty(2, length, **floats)
    partials = torch.empty(5, batch, splits, dtype=torch.float64, device=policy.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=policy.device)
    pointers, flags = source.launch_arguments(batch)
    preference_loss_kernel[(splits, batch)](
        policy, reference, recorded, *pointers, timesteps, prob, usable, weight, correction, beta,
        partials, ticket, loss, terms, tables,
        batch, channels, height * width, elements, float(elements), length, sft_weight,
        SHAPE=SHAPES.index(shape), POLICY_LAST=policy_last, REFERENCE_LAST=reference_last, **flags,
        BLOCK=BLOCK, PAIRS=max(1, PAIR_TILE // splits_block), SPLITS=splits_block,
        num_warps=WARPS, **PINNED, **registers(REGISTERS[policy.element_size()]),
    )  # fmt: skip
    return loss, terms, tables


def _launch_backward(grad, slopes, policy, source: Source, timesteps, usable) -> torch.Tensor:
    """The gradient [2B, C, H, W] in the policy's dtype and memory format, in one kernel."""
    policy, policy_last = addressable(policy)
    samples, channels, height, width = policy.shape
    batch, elements = samples // 2, channels * height * width
    out = empty_like(policy, policy.dtype)
    pointers, flags = source.launch_arguments(batch)
    preference_loss_backward_kernel[(triton.cdiv(elements, BLOCK), batch)](
        grad, slopes, policy, *pointers, timesteps, usable, out,
        batch, channels, height * width, elements, float(elements),
        POLICY_LAST=policy_last, **flags, BLOCK=BLOCK, num_warps=WARPS, **PINNED,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------------ plain torch


def _pointwise(z: torch.Tensor, p: torch.Tensor, shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(p f(z) + (1 - p) f(-z), its derivative by z)."""
    if shape == "sigmoid":
        small = torch.sigmoid(-z.abs())
        return (1 - p) * z - F.logsigmoid(z), torch.where(z >= 0, (1 - p) - small, small - p)
    if shape == "hinge":
        return p * F.relu(1 - z) + (1 - p) * F.relu(1 + z), (1 - p) * (z > -1) - p * (z < 1)
    return p * (z - 0.5) ** 2 + (1 - p) * (z + 0.5) ** 2, 2 * z + (1 - 2 * p)


def _table_sums(d: torch.Tensor, timesteps: torch.Tensor, counted: torch.Tensor, length: int) -> torch.Tensor:
    """[2, T]: sum of d and number of the counted pairs per timestep, in a fixed order (index_add varies on a GPU)."""
    match_TB = (torch.arange(length, device=d.device)[:, None] == timesteps[None]) & counted[None]
    total = torch.where(match_TB, d.double()[None], 0.0).sum(1).to(d.dtype)
    return torch.stack((total, match_TB.sum(1).to(d.dtype)))


def _forward_reference(
    policy, reference, recorded, source: Source, timesteps, prob, usable, weight, correction, beta, shape: str, sft_weight: float
):
    """Plain torch form of `_launch_forward`, in fp32 or float64; differentiable in `policy` through `loss`."""
    live = usable > 0
    timesteps = torch.where(live, timesteps, 0)
    live_samples = live.repeat(2).view(-1, 1, 1, 1)
    target = torch.where(live_samples, source.tensor(policy, timesteps), 0.0)
    prediction = torch.where(live_samples, wide(policy), 0.0)
    win, lose = (prediction - target).square().flatten(1).mean(1).chunk(2)
    zero = torch.zeros_like(win)
    frozen_win, frozen_lose, d = zero, zero, zero
    if reference is not None:
        frozen = torch.where(live_samples, wide(reference), 0.0)
        frozen_win, frozen_lose = (frozen - target).square().flatten(1).mean(1).chunk(2)
        change = (prediction - frozen) * ((prediction - target) + (frozen - target))
        change_win, change_lose = change.flatten(1).chunk(2)
        d = (change_win - change_lose).mean(1)
    elif recorded is not None:
        frozen_win, frozen_lose = torch.where(live, recorded.to(win.dtype), 0.0)
        d = (win - frozen_win) - (lose - frozen_lose)
    if reference is None and recorded is None:
        z, loss, slope_win, slope_lose = zero, win, zero + 1, zero
    else:
        p = prob.to(win.dtype)
        z = -(0.5 * beta) * (weight[timesteps] * d + torch.where(p == 0.5, 0.0, correction[timesteps]))
        loss, derivative = _pointwise(z, p, shape)
        loss = loss + sft_weight * win
        slope_win = derivative * (-(0.5 * beta) * weight[timesteps]) + sft_weight
        slope_lose = derivative * ((0.5 * beta) * weight[timesteps])
    accuracy = torch.where(d < 0, 1.0, torch.where(d == 0, 0.5, 0.0)).to(d.dtype)
    terms = torch.stack((z, d, win, lose, frozen_win, frozen_lose, accuracy, slope_win, slope_lose)).detach()
    tables = _table_sums(d.detach(), timesteps, live & (prob > 0.5), weight.shape[0])
    return torch.where(live, loss, 0.0), torch.where(live, terms, 0.0), tables


def _backward_reference(grad, slopes, policy, source: Source, timesteps, usable) -> torch.Tensor:
    """Plain torch form of `_launch_backward`: slope grad (2 / n) (policy - target)."""
    live = usable > 0
    target = source.tensor(policy, torch.where(live, timesteps, 0))
    scale = (slopes * (grad * 2) / policy[0].numel()).view(-1, 1, 1, 1)
    gradient = torch.where(live.repeat(2).view(-1, 1, 1, 1), scale * (wide(policy) - target), 0.0)
    return empty_like(policy, policy.dtype).copy_(gradient)


# -------------------------------------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("csrc_triton::preference_loss", mutates_args=())
def _preference_loss(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    recorded: torch.Tensor | None,
    target: torch.Tensor | None,
    latents: torch.Tensor | None,
    alphas: torch.Tensor | None,
    keys: torch.Tensor | None,
    draws: torch.Tensor | None,
    seed: torch.Tensor | None,
    timesteps: torch.Tensor,
    prob: torch.Tensor,
    usable: torch.Tensor,
    weight: torch.Tensor,
    correction: torch.Tensor,
    beta: torch.Tensor,
    shape: str,
    sft_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = _launch_forward if runs_triton(policy) else _forward_reference
    source = Source(target, latents, alphas, keys, draws, seed)
    return run(policy, reference, recorded, source, timesteps, prob, usable, weight, correction, beta, shape, sft_weight)


@_preference_loss.register_fake
def _(policy, reference, recorded, target, latents, alphas, keys, draws, seed, timesteps, prob, usable, weight, *_):
    batch, floats = policy.shape[0] // 2, {"dtype": wide(policy).dtype}
    return (
        policy.new_empty(batch, **floats),
        policy.new_empty(TERMS, batch, **floats),
        policy.new_empty(2, weight.shape[0], **floats),
    )


@torch.library.custom_op("csrc_triton::preference_loss_backward", mutates_args=())
def _preference_loss_backward(
    grad: torch.Tensor,
    slopes: torch.Tensor,
    policy: torch.Tensor,
    target: torch.Tensor | None,
    latents: torch.Tensor | None,
    alphas: torch.Tensor | None,
    keys: torch.Tensor | None,
    draws: torch.Tensor | None,
    seed: torch.Tensor | None,
    timesteps: torch.Tensor,
    usable: torch.Tensor,
) -> torch.Tensor:
    run = _launch_backward if runs_triton(policy) else _backward_reference
    source = Source(target, latents, alphas, keys, draws, seed)
    return run(grad.contiguous(), slopes.contiguous(), policy, source, timesteps, usable)


@_preference_loss_backward.register_fake
def _(grad, slopes, policy, *_):
    return empty_like(policy, policy.dtype)


def _setup_context(ctx, inputs, output):
    policy, _, _, *source, timesteps, _, usable, _, _, _, _, _ = inputs
    ctx.save_for_backward(output[1], policy, *source, timesteps, usable)


def _backward(ctx, grad_loss, grad_terms, grad_tables):
    terms, *saved = ctx.saved_tensors
    return _preference_loss_backward(grad_loss, terms[7:].contiguous(), *saved), *[None] * 16


_preference_loss.register_autograd(_backward, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------------------------- public functions


def _prepare(
    policy,
    timesteps,
    prob,
    usable,
    weight,
    correction,
    beta,
    shape,
    reference,
    recorded,
    target,
    noise,
    latents,
    alphas,
    sft_weight,
):
    """Checks what callers get wrong and brings tables and scalars to the dtype of the arithmetic."""
    assert policy.ndim == 4 and policy.shape[0] % 2 == 0, f"policy must be [2B, C, H, W], got {tuple(policy.shape)}"
    batch = policy.shape[0] // 2
    for name, value in (("timesteps", timesteps), ("prob", prob), ("usable", usable)):
        assert value.shape == (batch,), f"{name} must be [{batch}], got {tuple(value.shape)}"
    assert timesteps.dtype == torch.int64, f"timesteps must be int64, got {timesteps.dtype}"
    assert weight.ndim == 1 and weight.shape == correction.shape, (
        f"weight and correction must both be [T], got {tuple(weight.shape)}, {tuple(correction.shape)}"
    )
    assert shape in SHAPES, f"shape {shape!r}: expected one of {SHAPES}"
    assert reference is None or recorded is None, "reference predictions and recorded reference errors exclude each other"
    assert reference is None or reference.shape == policy.shape, (
        f"reference {tuple(reference.shape)}: expected {tuple(policy.shape)}"
    )
    assert recorded is None or recorded.shape == (2, batch), f"recorded errors must be [2, {batch}], got {tuple(recorded.shape)}"
    assert sft_weight == 0 or reference is not None or recorded is not None, (
        "without a reference the loss is the policy's error already"
    )
    assert (target is None) != (noise is None), "give either the target or the (keys, draws, seed) of the noise"
    assert target is None or (target.shape[0] in (batch, 2 * batch) and target.shape[1:] == policy.shape[1:]), (
        f"target {tuple(target.shape)}: expected [B or 2B, C, H, W] like the policy {tuple(policy.shape)}"
    )
    assert (latents is None) == (alphas is None) and (latents is None or target is None), (
        "latents and alphas_cumprod belong together, to the v target made from the noise"
    )
    assert latents is None or latents.shape == policy.shape, f"latents {tuple(latents.shape)}: expected {tuple(policy.shape)}"
    dtype = wide(policy).dtype
    keys, draws, seed = (*noise[:2], seed_tensor(noise[2], policy.device)) if noise is not None else (None, None, None)
    beta = beta.to(dtype) if isinstance(beta, torch.Tensor) else torch.full((), beta, dtype=dtype, device=policy.device)
    floats = [x.detach().to(dtype).contiguous() for x in (prob, usable, weight, correction)]
    reference = reference.detach() if reference is not None else None
    recorded = recorded.detach().to(dtype).contiguous() if recorded is not None else None
    return (
        reference,
        recorded,
        Source(target, latents, alphas, keys, draws, seed),
        (timesteps, *floats, beta, shape, float(sft_weight)),
    )


def _result(loss, terms, tables) -> PreferenceLoss:
    terms, tables = terms.detach(), tables.detach()
    return PreferenceLoss(loss, terms[0], terms[1], terms[2:6], terms[6], tables[0], tables[1])


def preference_loss(
    policy: torch.Tensor,
    timesteps: torch.Tensor,
    prob: torch.Tensor,
    usable: torch.Tensor,
    weight: torch.Tensor,
    correction: torch.Tensor,
    beta: torch.Tensor | float,
    *,
    shape: str,
    reference: torch.Tensor | None = None,
    recorded: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor | int] | None = None,
    latents: torch.Tensor | None = None,
    alphas_cumprod: torch.Tensor | None = None,
    sft_weight: float = 0.0,
) -> PreferenceLoss:
    """Loss of each of B pairs, and what a trainer reads off it.

    policy: predictions [2B, C, H, W], wins then losers; gradients flow into it, through `loss` only, and no second derivative
    exists. timesteps [B] int64 within the tables. prob [B] in [1/2, 1]: probability that win is preferred. usable [B]: 0 marks
    a hole, whose rows are not read and whose results and gradient are 0. weight, correction [T]. beta: 0-d tensor (a float is
    frozen inside a CUDA graph). shape: "sigmoid", "hinge" or "ipo".

    Reference: predictions [2B, C, H, W] (`reference`), or errors [2, B], win and lose (`recorded`), or neither: then the loss
    is the policy's win error, logit and difference are 0. Target: `target` [2B, C, H, W], or [B, C, H, W] shared by both
    halves, or the (keys [B], draws [B], seed) of the noise, regenerated in fp32; with `latents` [2B, C, H, W] and
    `alphas_cumprod` [T] it becomes the v target. Errors are taken in fp32 whatever the dtypes (float64 for a float64 policy, in
    plain torch).
    """
    reference, recorded, source, rest = _prepare(
        policy, timesteps, prob, usable, weight, correction, beta, shape,
        reference, recorded, target, noise, latents, alphas_cumprod, sft_weight,
    )  # fmt: skip
    return _result(*_preference_loss(policy, reference, recorded, *source, *rest))


def preference_loss_reference(
    policy, timesteps, prob, usable, weight, correction, beta, *, shape, reference=None, recorded=None, target=None, noise=None,
    latents=None, alphas_cumprod=None, sft_weight=0.0,
) -> PreferenceLoss:  # fmt: skip
    """Plain torch form of `preference_loss` for any device, with torch's own autograd; same arguments, same results."""
    reference, recorded, source, rest = _prepare(
        policy, timesteps, prob, usable, weight, correction, beta, shape,
        reference, recorded, target, noise, latents, alphas_cumprod, sft_weight,
    )  # fmt: skip
    return _result(*_forward_reference(policy, reference, recorded, source, *rest))

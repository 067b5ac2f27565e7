"""Everything of a pair that needs its predictions: four errors, difference and logit in one launch; their gradient in
another.

    e(x)   = mean over C, H, W of (model(x_t, t) - target)^2                       DDPM, Ho et al. 2020, eq. 14
    d      = (e_policy(w) - e_ref(w)) - (e_policy(l) - e_ref(l))                   Diffusion-DPO, Wallace et al. 2024, eq. 14
    z      = -(beta/2) (weight(t) d + correction(t)),  correction 0 where p = 1/2  DDE, Shi et al. 2024 (arXiv 2411.14871)
    target = of_noise(t) eps + of_data(t) x_0                                      epsilon (1, 0), v (signal, -spread), flow (1, -1)

What follows z (shape, labels, a supervised term, another objective) is a function of B numbers: dpo/objective.py.

d is not taken from rounded errors but from the sum over elements of (p - r)(p + r - 2 target), win minus lose: exactly
0 where policy and reference agree, and free of cancellation; so z is exactly 0 there. With recorded reference errors d
is formed from the four means.

Gradient: the errors' slope is 1 for d and for themselves, and z's is -(beta/2) weight(t), which the forward hands on as
`gain`. So one number for each pair and side, slope(w) and slope(l), is all that the backward needs: d / d policy =
slope (2 / n) (policy - target), n = C H W.
"""

from typing import NamedTuple

import torch

from csrc_triton.language import triton
from csrc_triton.latents import addressable, empty_like
from csrc_triton.noising import pair_noise
from csrc_triton.op import op
from csrc_triton.pair_errors_kernels import (
    BLOCK,
    PAIR_TILE,
    REGISTERS,
    WARPS,
    pair_errors_backward_kernel,
    pair_errors_kernel,
)
from csrc_triton.philox import seed_tensor
from csrc_triton.runtime import PINNED, on_its_device, registers, runs_triton, wide


class PairErrors(NamedTuple):
    """What `pair_errors` returns: fp32, or float64 for a float64 policy. Holes are 0 everywhere.

    `logit`, `difference` and `errors` carry gradients to the policy; the others do not.
    """

    logit: torch.Tensor  # [B] z
    difference: torch.Tensor  # [B] d
    errors: torch.Tensor  # [4, B]: policy win, policy lose, reference win, reference lose
    table_sum: torch.Tensor  # [T]: sum of d over the usable pairs with p > 1/2 at each timestep
    table_count: torch.Tensor  # [T]: their number
    gain: torch.Tensor  # [B]: d logit / d difference, -(beta/2) weight(t); 0 without a reference
    product: torch.Tensor  # [B]: mean of (policy - target) of the win times that of the lose half
    sizes: torch.Tensor | None = (
        None  # [2, 2B]: root mean squares of the predictions, policy and reference, where taken
    )


class Target(NamedTuple):
    """Where the target comes from: given, or the noise of (keys, draws, seed), or that noise and x_0 by the tables."""

    given: torch.Tensor | None  # [B or 2B, C, H, W]
    latents: torch.Tensor | None  # [2B, C, H, W] x_0
    of_noise: torch.Tensor | None  # [T]
    of_data: torch.Tensor | None  # [T]
    keys: torch.Tensor | None  # [B] int64
    draws: torch.Tensor | None  # [B] int64
    seed: torch.Tensor | None  # [] int64

    def launch_arguments(self, batch: int) -> tuple[tuple, dict]:
        """(the seven pointers, the constexprs that say what they are)."""
        given, given_last = addressable(self.given) if self.given is not None else (None, False)
        latents, latents_last = addressable(self.latents) if self.latents is not None else (None, False)
        shared = given is not None and given.shape[0] == batch
        flags = {"SHARED": shared, "TARGET_LAST": given_last, "LATENTS_LAST": latents_last}
        return (given, latents, self.of_noise, self.of_data, self.keys, self.draws, self.seed), flags

    def tensor(self, policy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target [2B, C, H, W] in fp32 or float64, in plain torch."""
        if self.given is not None:
            return wide(self.given) if self.given.shape == policy.shape else wide(self.given).repeat(2, 1, 1, 1)
        dtype = wide(policy).dtype
        noise = pair_noise(self.keys, self.draws, self.seed, tuple(policy.shape[1:]), dtype).repeat(2, 1, 1, 1)
        if self.latents is None or self.of_noise is None or self.of_data is None:
            return noise
        of_noise, of_data = (table[timesteps].repeat(2).view(-1, 1, 1, 1) for table in (self.of_noise, self.of_data))
        return of_noise * noise + of_data * self.latents.to(dtype)


# -------------------------------------------------------------------------------------------------------------------- launchers


@on_its_device
def _launch_forward(policy, reference, recorded, target: Target, timesteps, prob, usable, weight, correction, beta):
    """(logit [B], difference [B], errors [4, B], gain [B], product [B], tables [2, T]) in fp32. One kernel; its ticket is zeroed
    before it.
    """
    policy, policy_last = addressable(policy)
    reference, reference_last = addressable(reference) if reference is not None else (None, False)
    samples, channels, height, width = policy.shape
    batch, elements, length = samples // 2, channels * height * width, weight.shape[0]
    splits = triton.cdiv(elements, BLOCK)
    splits_block = triton.next_power_of_2(splits)
    floats = {"dtype": torch.float32, "device": policy.device}
    logit, difference, gain, product = (torch.empty(batch, **floats) for _ in range(4))
    errors, tables = torch.empty(4, batch, **floats), torch.empty(2, length, **floats)
    partials = torch.empty(6, batch, splits, dtype=torch.float64, device=policy.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=policy.device)
    pointers, flags = target.launch_arguments(batch)
    pair_errors_kernel[(splits, batch)](
        policy, reference, recorded, *pointers, timesteps, prob, usable, weight, correction, beta,
        partials, ticket, logit, difference, errors, gain, product, tables,
        batch, channels, height * width, elements, float(elements), length,
        POLICY_LAST=policy_last, REFERENCE_LAST=reference_last, **flags,
        BLOCK=BLOCK, PAIRS=max(1, PAIR_TILE // splits_block), SPLITS=splits_block,
        num_warps=WARPS, **PINNED, **registers(REGISTERS[policy.element_size()]),
    )  # fmt: skip
    return logit, difference, errors, gain, product, tables


@on_its_device
def _launch_backward(slopes, policy, target: Target, timesteps, usable) -> torch.Tensor:
    """The gradient [2B, C, H, W] in the policy's dtype and memory format, in one kernel."""
    policy, policy_last = addressable(policy)
    samples, channels, height, width = policy.shape
    batch, elements = samples // 2, channels * height * width
    out = empty_like(policy, policy.dtype)
    pointers, flags = target.launch_arguments(batch)
    pair_errors_backward_kernel[(triton.cdiv(elements, BLOCK), batch)](
        slopes, policy, *pointers, timesteps, usable, out,
        batch, channels, height * width, elements, float(elements),
        POLICY_LAST=policy_last, **flags, BLOCK=BLOCK, num_warps=WARPS, **PINNED,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------------ plain torch


def _table_sums(d: torch.Tensor, timesteps: torch.Tensor, counted: torch.Tensor, length: int) -> torch.Tensor:
    """[2, T]: sum of d and number of the counted pairs per timestep, in a fixed order (index_add varies on a GPU)."""
    match_TB = (torch.arange(length, device=d.device)[:, None] == timesteps[None]) & counted[None]
    total = torch.where(match_TB, d.double()[None], 0.0).sum(1).to(d.dtype)
    return torch.stack((total, match_TB.sum(1).to(d.dtype)))


def _forward_reference(policy, reference, recorded, target: Target, timesteps, prob, usable, weight, correction, beta):
    """Plain torch form of `_launch_forward`, in fp32 or float64; differentiable in `policy`."""
    live = usable > 0
    timesteps = torch.where(live, timesteps, 0)
    live_samples = live.repeat(2).view(-1, 1, 1, 1)
    aim = torch.where(live_samples, target.tensor(policy, timesteps), 0.0)
    prediction = torch.where(live_samples, wide(policy), 0.0)
    residual = prediction - aim
    win, lose = residual.square().flatten(1).mean(1).chunk(2)
    residual_win, residual_lose = residual.detach().flatten(1).chunk(2)
    product = (residual_win * residual_lose).mean(1)
    zero = torch.zeros_like(win)
    frozen_win, frozen_lose, d, z, gain = zero, zero, zero, zero, zero
    if reference is not None:
        frozen = torch.where(live_samples, wide(reference), 0.0)
        frozen_win, frozen_lose = (frozen - aim).square().flatten(1).mean(1).chunk(2)
        change = (prediction - frozen) * ((prediction - aim) + (frozen - aim))
        change_win, change_lose = change.flatten(1).chunk(2)
        d = (change_win - change_lose).mean(1)
    elif recorded is not None:
        frozen_win, frozen_lose = torch.where(live, recorded.to(win.dtype), 0.0)
        d = (win - frozen_win) - (lose - frozen_lose)
    if reference is not None or recorded is not None:
        gain = -(0.5 * beta) * weight[timesteps]
        z = -(0.5 * beta) * (weight[timesteps] * d + torch.where(prob == 0.5, 0.0, correction[timesteps]))
    errors = torch.stack((win, lose, frozen_win, frozen_lose))
    tables = _table_sums(d.detach(), timesteps, live & (prob > 0.5), weight.shape[0])
    return *(torch.where(live, value, 0.0) for value in (z, d, errors, gain, product)), tables


def _backward_reference(slopes, policy, target: Target, timesteps, usable) -> torch.Tensor:
    """Plain torch form of `_launch_backward`: slope (2 / n) (policy - target)."""
    live = usable > 0
    aim = target.tensor(policy, torch.where(live, timesteps, 0))
    scale = (slopes.flatten() * 2 / policy[0].numel()).view(-1, 1, 1, 1)
    gradient = torch.where(live.repeat(2).view(-1, 1, 1, 1), scale * (wide(policy) - aim), 0.0)
    return empty_like(policy, policy.dtype).copy_(gradient)


# -------------------------------------------------------------------------------------------------------------------------- ops


@op("pair_errors")
def _pair_errors(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    recorded: torch.Tensor | None,
    given: torch.Tensor | None,
    latents: torch.Tensor | None,
    of_noise: torch.Tensor | None,
    of_data: torch.Tensor | None,
    keys: torch.Tensor | None,
    draws: torch.Tensor | None,
    seed: torch.Tensor | None,
    timesteps: torch.Tensor,
    prob: torch.Tensor,
    usable: torch.Tensor,
    weight: torch.Tensor,
    correction: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    run = _launch_forward if runs_triton(policy) else _forward_reference
    target = Target(given, latents, of_noise, of_data, keys, draws, seed)
    return run(policy, reference, recorded, target, timesteps, prob, usable, weight, correction, beta)


@_pair_errors.register_fake
def _(
    policy, reference, recorded, given, latents, of_noise, of_data, keys, draws, seed,
    timesteps, prob, usable, weight, correction, beta,
):  # fmt: skip
    batch, floats = policy.shape[0] // 2, {"dtype": wide(policy).dtype}
    shapes = ((batch,), (batch,), (4, batch), (batch,), (batch,), (2, weight.shape[0]))
    return tuple(policy.new_empty(shape, **floats) for shape in shapes)


@op("pair_errors_backward")
def _pair_errors_backward(
    slopes: torch.Tensor,  # [2, B]
    policy: torch.Tensor,
    given: torch.Tensor | None,
    latents: torch.Tensor | None,
    of_noise: torch.Tensor | None,
    of_data: torch.Tensor | None,
    keys: torch.Tensor | None,
    draws: torch.Tensor | None,
    seed: torch.Tensor | None,
    timesteps: torch.Tensor,
    usable: torch.Tensor,
) -> torch.Tensor:
    run = _launch_backward if runs_triton(policy) else _backward_reference
    target = Target(given, latents, of_noise, of_data, keys, draws, seed)
    return run(slopes.contiguous(), policy, target, timesteps, usable)


@_pair_errors_backward.register_fake
def _(slopes, policy, *_):
    return empty_like(policy, policy.dtype)


def _setup_context(ctx, inputs, output):
    policy, _, _, *target, timesteps, _, usable, _, _, _ = inputs
    ctx.set_materialize_grads(False)  # an objective seldom uses every result
    ctx.save_for_backward(output[3], policy, *target, timesteps, usable)


def slopes(gain, grad_logit, grad_difference, grad_errors) -> torch.Tensor:
    """[2, B]: the gradient by the policy's win and lose error, from those by logit, difference [B] and errors [4, B]
    (None: zero).
    """
    through_difference = torch.zeros_like(gain) if grad_logit is None else grad_logit * gain
    if grad_difference is not None:
        through_difference = through_difference + grad_difference
    both = torch.stack((through_difference, -through_difference))
    return both if grad_errors is None else both + grad_errors[:2]


def _backward(ctx, grad_logit, grad_difference, grad_errors, *_):
    gain, *saved = ctx.saved_tensors
    return _pair_errors_backward(slopes(gain, grad_logit, grad_difference, grad_errors), *saved), *[None] * 15


_pair_errors.register_autograd(_backward, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------------------------- public functions


def _checked(
    policy, timesteps, prob, usable, weight, correction, beta,
    reference, recorded, target, noise, latents, of_noise, of_data,
):  # fmt: skip
    """Checks what callers get wrong and brings tables and scalars to the dtype of the arithmetic."""
    assert policy.ndim == 4 and policy.shape[0] % 2 == 0, f"policy must be [2B, C, H, W], got {tuple(policy.shape)}"
    batch = policy.shape[0] // 2
    for name, value in (("timesteps", timesteps), ("prob", prob), ("usable", usable)):
        assert value.shape == (batch,), f"{name} must be [{batch}], got {tuple(value.shape)}"
    assert timesteps.dtype == torch.int64, f"timesteps must be int64, got {timesteps.dtype}"
    assert weight.ndim == 1 and weight.shape == correction.shape, (
        f"weight and correction must both be [T], got {tuple(weight.shape)}, {tuple(correction.shape)}"
    )
    assert reference is None or recorded is None, (
        "reference predictions and recorded reference errors exclude each other"
    )
    assert reference is None or reference.shape == policy.shape, (
        f"reference {tuple(reference.shape)}: expected {tuple(policy.shape)}"
    )
    assert recorded is None or recorded.shape == (2, batch), (
        f"recorded errors must be [2, {batch}], got {tuple(recorded.shape)}"
    )
    assert (target is None) != (noise is None), "give either the target or the (keys, draws, seed) of the noise"
    assert target is None or (target.shape[0] in (batch, 2 * batch) and target.shape[1:] == policy.shape[1:]), (
        f"target {tuple(target.shape)}: expected [B or 2B, C, H, W] like the policy {tuple(policy.shape)}"
    )
    made = (latents, of_noise, of_data)
    assert all(x is None for x in made) or (target is None and not any(x is None for x in made)), (
        "latents, of_noise and of_data belong together, to the target made from noise and data"
    )
    assert latents is None or latents.shape == policy.shape, (
        f"latents {tuple(latents.shape)}: expected {tuple(policy.shape)}"
    )
    dtype = wide(policy).dtype

    def plain(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.detach().to(dtype).contiguous()

    keys, draws, seed = (*noise[:2], seed_tensor(noise[2], policy.device)) if noise is not None else (None, None, None)
    beta = beta.to(dtype) if isinstance(beta, torch.Tensor) else torch.full((), beta, dtype=dtype, device=policy.device)
    reference = reference.detach() if reference is not None else None
    aim = Target(target, latents, plain(of_noise), plain(of_data), keys, draws, seed)
    tables = (plain(prob), plain(usable), plain(weight), plain(correction), beta)
    return policy, reference, plain(recorded), aim, (timesteps, *tables)


def _result(logit, difference, errors, gain, product, tables) -> PairErrors:
    tables = tables.detach()
    return PairErrors(logit, difference, errors, tables[0], tables[1], gain.detach(), product.detach())


def pair_errors(
    policy: torch.Tensor,
    timesteps: torch.Tensor,
    prob: torch.Tensor,
    usable: torch.Tensor,
    weight: torch.Tensor,
    correction: torch.Tensor,
    beta: torch.Tensor | float,
    *,
    reference: torch.Tensor | None = None,
    recorded: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor | int] | None = None,
    latents: torch.Tensor | None = None,
    of_noise: torch.Tensor | None = None,
    of_data: torch.Tensor | None = None,
) -> PairErrors:
    """Errors, difference and logit of each of B pairs, and DDE's sums by timestep.

    policy: predictions [2B, C, H, W], wins then losers; gradients flow into it, no second derivative exists. timesteps
    [B] int64 within the tables. prob [B] in [1/2, 1]: probability that win is preferred. usable [B]: 0 marks a hole,
    whose rows are not read and whose results and gradient are 0. weight, correction [T]. beta: 0-d tensor (a float is
    frozen inside a CUDA graph).

    Reference: predictions [2B, C, H, W] (`reference`), or errors [2, B], win and lose (`recorded`), or neither: then
    logit and difference are 0. Target: `target` [2B, C, H, W], or [B, C, H, W] shared by both halves, or the (keys [B],
    draws [B], seed) of the noise, regenerated in fp32; with `latents` [2B, C, H, W] and the tables `of_noise`,
    `of_data` [T] it becomes of_noise(t) eps + of_data(t) x_0. Errors are taken in fp32 whatever the dtypes (float64 for
    a float64 policy, in plain torch).
    """
    policy, reference, recorded, aim, rest = _checked(
        policy, timesteps, prob, usable, weight, correction, beta,
        reference, recorded, target, noise, latents, of_noise, of_data,
    )  # fmt: skip
    return _result(*_pair_errors(policy, reference, recorded, *aim, *rest))


def pair_errors_reference(
    policy, timesteps, prob, usable, weight, correction, beta, *, reference=None, recorded=None, target=None, noise=None,
    latents=None, of_noise=None, of_data=None,
) -> PairErrors:  # fmt: skip
    """Plain torch form of `pair_errors` for any device, with torch's own autograd; same arguments, same results."""
    policy, reference, recorded, aim, rest = _checked(
        policy, timesteps, prob, usable, weight, correction, beta,
        reference, recorded, target, noise, latents, of_noise, of_data,
    )  # fmt: skip
    return _result(*_forward_reference(policy, reference, recorded, aim, *rest))

"""Every kernel on the device against float64, by the rule of the tests: at most twice the error of plain torch in the
same dtype.

And that the ops of a step can be captured in a CUDA graph, whose replays draw new noise when the draws in device memory
have moved on. parity_pairs.py has pairs in all their forms, AdamW8bit and large tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import parity_pairs
from benchmarks.checks import Check
from benchmarks.measuring import captured
from benchmarks.parity_pairs import DTYPES
from csrc_triton import philox
from csrc_triton.geglu import geglu
from csrc_triton.group_norm_silu import group_norm_silu
from csrc_triton.layer_norm import add_layer_norm, layer_norm
from csrc_triton.noising import noise_pairs, sample_posterior
from csrc_triton.pair_errors import pair_errors
from csrc_triton.timesteps import draw_timesteps
from dpo.objective import pair_loss


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    """Rows: what is compared, dtype, largest error of the kernel and of plain torch against float64, and whether it passes."""
    found = [Check("what is keyed", lambda: [random_numbers(device), timesteps(device), *posteriors(device)])]
    for dtype in DTYPES:
        for name in ("geglu", "group_norm_silu", "layer_norm", "add_layer_norm"):
            found.append(Check(f"{name} {str(dtype)[6:]}", lambda n=name, d=dtype: layer(device, n, d, smoke)))
    if device.type == "cuda":
        found.append(Check("ops of a step in a CUDA graph", lambda: [graph_replay(device)]))
    return [*found, *parity_pairs.checks(device, smoke, seconds)]


def layer(device: torch.device, name: str, dtype: torch.dtype, smoke: bool) -> Iterator[dict[str, Any]]:
    """The rows of one op between layers."""
    for known, fused, plain, inputs in _functions(device, dtype, smoke):
        if known == name:
            yield from compare(name, dtype, fused, plain, inputs)


def random_numbers(device: torch.device) -> dict[str, Any]:
    """Philox normals on the device equal those of the CPU, bit for bit."""
    keys, draws = torch.arange(5) * 7919 - 3, torch.arange(5)
    expected = philox.normal(keys, draws, philox.Stream.NOISE, 1, (4, 33, 17))
    latents = torch.zeros(10, 4, 33, 17, device=device)
    path = (torch.zeros(1000), torch.ones(1000))  # signal 0, spread 1: x_t is the noise itself
    on = [x.to(device) for x in (torch.zeros(5, dtype=torch.int64), *path, keys, draws, torch.tensor(1))]
    found = noise_pairs(latents, *on)[:5].cpu()
    error = (found - expected).abs().max().item()
    return {"check": "philox normals", "dtype": "fp32", "kernel": error, "plain": 0.0, "ok": error <= 1e-6}


def timesteps(device: torch.device) -> dict[str, Any]:
    """Drawn timesteps on the device equal those of the CPU."""
    values, keys, draws = torch.arange(0, 1000, 3), torch.arange(300) * 7919 - 3, torch.arange(300) % 4
    found = draw_timesteps(*(x.to(device) for x in (values, keys, draws, torch.tensor(1)))).cpu()
    error = (found - draw_timesteps(values, keys, draws, torch.tensor(1))).abs().max().item()
    return {"check": "draw_timesteps", "dtype": "int64", "kernel": float(error), "plain": 0.0, "ok": error == 0}


def posteriors(device: torch.device) -> Iterator[dict[str, Any]]:
    """Samples of a posterior whose 16 channels have a shift and scale each, in both memory formats, against float64."""
    torch.manual_seed(8)
    keys, draws, scale, shift = torch.arange(3) + 5, torch.arange(3), torch.rand(16) + 0.5, torch.randn(16)
    for dtype in DTYPES:
        for form in (torch.contiguous_format, torch.channels_last):
            mean, std = torch.randn(2, 6, 16, 9, 7).to(dtype)

            def sampled(where: torch.device, wide: bool, mean=mean, std=std, form=form) -> Tensor:
                given = [(x.double() if wide else x).to(where) for x in (mean, std, scale, shift)]
                latents = [x.to(memory_format=form) for x in given[:2]]
                found = sample_posterior(
                    *latents, keys.to(where), draws.to(where), torch.tensor(1, device=where), *given[2:]
                )
                return found.double().cpu()

            cpu = torch.device("cpu")
            truth = sampled(cpu, True)
            kernel, plain = ((sampled(where, False) - truth).abs().max().item() for where in (device, cpu))
            name = "sample_posterior by channel" + (", channels_last" if form is torch.channels_last else "")
            yield parity_pairs.row_of(name, dtype, kernel, plain, 4 * torch.finfo(dtype).eps)


def _functions(
    device: torch.device, dtype: torch.dtype, smoke: bool
) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """(name, fused op, the same in plain torch, inputs): odd sizes, and means far from 0."""
    torch.manual_seed(0)
    channels = 64 if smoke else 320

    def make(*shape: int, offset: float = 0.0) -> Tensor:
        return (torch.randn(*shape, device=device) + offset).to(dtype)

    weight, bias = make(channels, offset=1.0), make(channels)
    image = make(3, channels, 19, 13, offset=4.0).to(memory_format=torch.channels_last)
    tokens = make(3, 77, channels, offset=4.0)

    def plain_geglu(proj: Tensor) -> Tensor:
        h, gate = proj.chunk(2, dim=-1)
        return h * F.gelu(gate)

    yield "geglu", geglu, plain_geglu, [make(3, 77, 2 * channels)]
    yield (
        "group_norm_silu",
        lambda x, w, b: group_norm_silu(x, w, b, 32),
        lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)),
        [image, weight, bias],
    )
    yield "layer_norm", layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), [tokens, weight, bias]
    yield (
        "add_layer_norm",
        lambda x, r, w, b: add_layer_norm(x, r, w, b)[1],
        lambda x, r, w, b: F.layer_norm(x + r, x.shape[-1:], w, b),
        [tokens, make(3, 77, channels), weight, bias],
    )


def compare(
    name: str, dtype: torch.dtype, fused: Callable, plain: Callable, inputs: list[Tensor]
) -> Iterator[dict[str, Any]]:
    """Outputs, then all gradients, of both against plain torch in float64."""

    def run(f: Callable, values: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in values]
        out = f(*leaves)
        slope = torch.linspace(-1, 1.5, out.numel(), device=out.device).view(out.shape).to(dtype).to(out.dtype)
        return [out, *torch.autograd.grad(out, leaves, slope)]

    found, usual = run(fused, inputs), run(plain, inputs)
    exact = run(plain, [x.double() for x in inputs])
    labels = ["forward", *[f"gradient {index}" for index in range(len(inputs))]]
    for label, a, b, truth in zip(labels, found, usual, exact):
        errors = [(x.double() - truth).abs().max().item() for x in (a, b)]
        floor = torch.finfo(dtype).eps * truth.abs().max().item()
        yield parity_pairs.row_of(f"{name} {label}", dtype, errors[0], errors[1], floor)


def ops_of_a_step(device: torch.device) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """(a function that runs the ops of a step forward and backward and returns what it found, the draws it uses)."""
    torch.manual_seed(2)
    pairs, channels, dtype = 3, 64, torch.bfloat16

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    latents, policy = make(2 * pairs, 4, 17, 9), make(2 * pairs, 4, 17, 9)
    projection, tokens, image = make(5, 7, 2 * channels), make(5, 7, channels), make(3, channels, 9, 5)
    weight, bias = make(channels), make(channels)
    index, ones = torch.arange(pairs, device=device), torch.ones(1000, device=device)
    draws, seed, beta = index.clone(), torch.tensor(7, device=device), torch.tensor(500.0, device=device)
    leaves = [policy, projection, tokens, image, weight, bias]

    def run() -> list[Tensor]:
        keys = (index + 5, draws, seed)
        noisy = noise_pairs(latents.detach(), index * 13, ones / 2, ones / 2, *keys)
        errors = pair_errors(
            policy + noisy, index * 13, ones[:pairs], ones[:pairs], ones, 0 * ones, beta,
            reference=policy.detach() * 0.9 + noisy, noise=keys,
        )  # fmt: skip
        terms = pair_loss(errors, ones[:pairs], ones[:pairs], index * 13, shape="sigmoid")
        total, normed = add_layer_norm(geglu(projection), tokens, weight, bias)
        embedding = tokens[:3, 0]
        images = group_norm_silu(image, weight, bias, 32, temb=embedding) * group_norm_silu(image, weight, bias, 32)
        normed = layer_norm(normed, weight, bias)
        found = [terms.loss, noisy, total, normed, images]
        return [*found, *torch.autograd.grad(sum(x.float().square().sum() for x in found), leaves)]

    return run, draws


def graph_replay(device: torch.device) -> dict[str, Any]:
    """The largest difference between a replay of a captured graph of the ops of a step, after new draws, and the ops
    themselves: 0.
    """
    run, draws = ops_of_a_step(device)
    graph, found = captured(run)
    draws += 1
    graph.replay()
    both = list(zip(found, run(), strict=True))
    worst = max((a.float() - b.float()).abs().max().item() for a, b in both)
    same = all(torch.equal(a, b) for a, b in both)  # not so for a NaN
    return {"check": "ops of a step in a CUDA graph", "dtype": "bfloat16", "kernel": worst, "plain": 0.0, "ok": same}

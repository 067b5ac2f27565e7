"""Each kernel beside eager torch and torch.compile on the shapes that SD 1.5 and SDXL give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import Check, said
from benchmarks.measuring import copy_bandwidth, device_seconds, host_seconds
from csrc_triton.geglu import geglu as fused_geglu
from csrc_triton.group_norm_silu import group_norm_silu as fused_group_norm_silu
from csrc_triton.layer_norm import add_layer_norm
from csrc_triton.noising import noise_pairs
from csrc_triton.pair_errors import pair_errors
from dpo.objective import pair_loss

BATCHES = {"SD 1.5": (1, 16, 64), "SDXL": (1, 4)}  # pairs
LATENTS = {"SD 1.5": (4, 64, 64), "SDXL": (4, 128, 128)}
GEGLU = {"SD 1.5": [(4096, 320), (1024, 640), (256, 1280)], "SDXL": [(4096, 640), (1024, 1280)]}  # tokens, width
GROUP_NORM = {
    "SD 1.5": [(320, 64), (640, 32), (1280, 16)],
    "SDXL": [(320, 128), (640, 64), (1280, 32)],
}  # channels, side
LAYER_BATCHES = {"SD 1.5": 16, "SDXL": 4}  # pairs that are trained


@dataclass(frozen=True)
class Case:
    """One op at one shape: `variants` are closures that run it once; `bytes` is the least that must move."""

    op: str
    model: str
    shape: str
    direction: str
    bytes: int
    variants: dict[str, Callable[[], Any]]


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    """Layers first: the pair's own ops are microseconds of a step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    budget = 0.01 if smoke else 0.05
    found = []
    for make in (geglu, group_norm_silu, layer_norm, pair_errors_and_loss, noising):
        found.append(Check(make.__name__, lambda m=make: rows(m, device, dtype, smoke, budget), max(60.0, seconds / 2)))
    return found


def rows(
    make: Callable[[torch.device, torch.dtype, bool], Iterator[Case]],
    device: torch.device,
    dtype: torch.dtype,
    smoke: bool,
    budget: float,
) -> Iterator[dict[str, Any]]:
    """A row a case; cases are made one at a time so that memory is freed between them."""
    bandwidth = copy_bandwidth(device)
    for case in make(device, dtype, smoke):
        if device.type != "cuda":
            del case.variants["compiled"]  # minutes of compilation on a CPU, for nothing that is reported
        yield measure(case, device, bandwidth, budget)


def measure(case: Case, device: torch.device, bandwidth: float, budget: float) -> dict[str, Any]:
    """One row of the table: times on the device alone, and what a call takes of the host. A variant that fails says why."""
    row: dict[str, Any] = {"op": case.op, "model": case.model, "shape": case.shape, "direction": case.direction}
    for name, work in case.variants.items():
        torch._dynamo.reset()
        try:
            row[f"{name}_us"] = device_seconds(work, device, budget) * 1e6
        except Exception as error:
            row["failed"] = f"{name}: {said(error)}"
    if "fused_us" in row:
        row["host_us"] = host_seconds(case.variants["fused"], device) * 1e6
        row["GB/s"] = case.bytes / row["fused_us"] / 1e3
        row["of copy"] = case.bytes / row["fused_us"] * 1e6 / bandwidth
        for other in ("eager", "compiled"):
            if f"{other}_us" in row:
                row[f"x {other}"] = row[f"{other}_us"] / row["fused_us"]
    return row


def _both(
    name: str, model: str, shape: str, sizes: tuple[int, int], fused: Callable, eager: Callable, *inputs: Tensor
) -> Iterator[Case]:
    """Forward, then forward and backward together (that is how a step runs them), of the fused op and of eager torch."""
    compiled = torch.compile(eager, dynamic=False)
    variants = {"fused": fused, "eager": eager, "compiled": compiled}
    with torch.no_grad():
        yield Case(
            name, model, shape, "forward", sizes[0], {key: (lambda f=f: f(*inputs)) for key, f in variants.items()}
        )
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.no_grad():
        grads = [torch.ones_like(out) for out in _tuple(fused(*inputs))]

    def both(f: Callable) -> Any:
        return torch.autograd.grad(_tuple(f(*leaves)), [x for x in leaves if x.requires_grad], grads)

    yield Case(
        name, model, shape, "forward+backward", sum(sizes), {key: (lambda f=f: both(f)) for key, f in variants.items()}
    )


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _keyed(pairs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """timesteps, keys, draws [B] and the seed."""
    index = torch.arange(pairs, device=device)
    return index * 37 % 1000, index + 12345, torch.zeros_like(index), torch.tensor(7, device=device)


def noising(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[Case]:
    abar = torch.linspace(0.999, 0.005, 1000, device=device)
    for model, shape in LATENTS.items():
        for pairs in (1,) if smoke else BATCHES[model]:
            latents = torch.randn(2 * pairs, *shape, device=device).to(dtype)
            t, keys, draws, seed = _keyed(pairs, device)
            path = (abar.sqrt(), (1 - abar).sqrt())

            def eager(latents: Tensor, t: Tensor = t) -> Tensor:
                noise = torch.randn_like(latents[: t.numel()]).repeat(2, 1, 1, 1)
                a = abar[t].repeat(2).view(-1, 1, 1, 1).to(latents.dtype)
                return a.sqrt() * latents + (1 - a).sqrt() * noise

            compiled = torch.compile(eager, dynamic=False)
            variants = {
                "fused": lambda x=latents, a=(t, *path, keys, draws, seed): noise_pairs(x, *a),
                "eager": lambda x=latents, f=eager: f(x),
                "compiled": lambda x=latents, f=compiled: f(x),
            }
            yield Case("noise_pairs", model, f"B={pairs}", "forward", 2 * latents.nbytes, variants)


def pair_errors_and_loss(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[Case]:
    """Eager is the peers' way: the noise was stored when x_t was made, and is read as the target."""
    weight, correction = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    beta = torch.tensor(2000.0, device=device)
    for model, shape in LATENTS.items():
        for pairs in (1,) if smoke else BATCHES[model]:
            policy = torch.randn(2 * pairs, *shape, device=device).to(dtype)
            reference = policy + 0.01 * torch.randn_like(policy)
            noise = torch.randn(pairs, *shape, device=device).repeat(2, 1, 1, 1)
            t, keys, draws, seed = _keyed(pairs, device)
            prob = usable = torch.ones(pairs, device=device)

            def fused(
                policy: Tensor, t=t, prob=prob, usable=usable, reference=reference, key=(keys, draws, seed)
            ) -> Tensor:
                found = pair_errors(policy, t, prob, usable, weight, correction, beta, reference=reference, noise=key)
                return pair_loss(found, prob, usable, t, shape="sigmoid").loss

            def eager(policy: Tensor, reference: Tensor = reference, noise: Tensor = noise) -> Tensor:
                p = (policy.float() - noise).square().mean((1, 2, 3))
                r = (reference.float() - noise).square().mean((1, 2, 3))
                win, lose = (p - r).chunk(2)
                return -F.logsigmoid(-1000.0 * (win - lose))

            yield from _both(
                "pair_errors", model, f"B={pairs}", (2 * policy.nbytes, 2 * policy.nbytes), fused, eager, policy
            )


def geglu(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[Case]:
    def eager(proj: Tensor) -> Tensor:
        h, gate = proj.chunk(2, dim=-1)
        return h * F.gelu(gate)

    for model, pairs, tokens, width in _layers(GEGLU, smoke):
        proj = torch.randn(2 * pairs, tokens, 8 * width, device=device).to(dtype)
        half = proj.nbytes // 2
        yield from _both(
            "geglu", model, f"{2 * pairs}x{tokens}x{8 * width}", (3 * half, 5 * half), fused_geglu, eager, proj
        )


def group_norm_silu(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[Case]:
    """The input is read twice (statistics, then values): three passes forward, five backward."""
    for model, pairs, channels, side in _layers(GROUP_NORM, smoke):
        x = torch.randn(2 * pairs, channels, side, side, device=device).to(dtype).to(memory_format=torch.channels_last)
        weight, bias = (
            torch.ones(channels, device=device, dtype=dtype),
            torch.zeros(channels, device=device, dtype=dtype),
        )

        def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fused_group_norm_silu(x, weight, bias, 32)

        def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(F.group_norm(x, 32, weight, bias))

        label, size = f"{2 * pairs}x{channels}x{side}x{side}", x.nbytes
        yield from _both("group_norm_silu", model, label, (3 * size, 5 * size), fused, eager, x, weight, bias)


def layer_norm(device: torch.device, dtype: torch.dtype, smoke: bool) -> Iterator[Case]:
    """With the residual add in front; the sum is needed again, so it is written too."""
    for model, pairs, tokens, width in _layers(GEGLU, smoke):
        x = torch.randn(2 * pairs, tokens, width, device=device).to(dtype)
        residual = torch.randn_like(x)
        weight, bias = torch.ones(width, device=device, dtype=dtype), torch.zeros(width, device=device, dtype=dtype)

        def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return total, F.layer_norm(total, total.shape[-1:], weight, bias)

        label = f"{2 * pairs}x{tokens}x{width}"
        yield from _both(
            "add_layer_norm",
            model,
            label,
            (4 * x.nbytes, 4 * x.nbytes),
            add_layer_norm,
            eager,
            x,
            residual,
            weight,
            bias,
        )


def _layers(table: dict, smoke: bool) -> Iterator[tuple[str, int, int, int]]:
    """(model, pairs, first size, second size) of a table of layer shapes."""
    small = [(32, 16 if table is GEGLU else 8)]
    for model, shapes in table.items():
        for first, second in small if smoke else shapes:
            yield model, 1 if smoke else LAYER_BATCHES[model], first, second

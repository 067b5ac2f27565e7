"""Pairs in every form that training gives them, AdamW8bit, and tensors beyond 2^31 elements, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Check
from csrc_triton.adamw8bit import AdamW8bit
from csrc_triton.geglu import geglu
from csrc_triton.group_norm_silu import group_norm_silu
from csrc_triton.layer_norm import layer_norm
from csrc_triton.noising import noise_pairs
from csrc_triton.pair_errors import pair_errors, pair_errors_reference
from dpo.objective import pair_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = ("sigmoid", "hinge", "ipo")
FORMS = {  # how reference and target reach the op
    "noise": {},
    "v-prediction": {"velocity": True},
    "given target": {"given": True},
    "recorded reference": {"recorded": True},
    "one pair": {"pairs": 1},
    "channels_last": {"channels_last": True},
}
LARGE = 2**31 + 2**26  # elements


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    found = [
        Check(f"pair_errors {name}", lambda n=name, f=form: pairs_in(device, n, f), 60) for name, form in FORMS.items()
    ]
    found.append(Check("AdamW8bit", lambda: adamw8bit(device), 30))
    for name in ("noise_pairs", "pair_errors", "geglu", "group_norm_silu", "layer_norm"):
        found.append(Check(f"{name} beyond 2^31", lambda n=name: beyond(device, n, 2**18 if smoke else LARGE), 30))
    return found


def row_of(name: str, dtype: torch.dtype, kernel: float, plain: float, floor: float) -> dict[str, Any]:
    """A row that passes where the kernel's error is at most twice that of plain torch, or below the floor of the dtype."""
    ok = kernel <= max(2 * plain, floor)
    return {"check": name, "dtype": str(dtype)[6:], "kernel": kernel, "plain": plain, "ok": ok}


def pairs_in(device: torch.device, name: str, form: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Logits and losses, and gradients of losses that are weighted unevenly, in each shape and dtype against float64."""
    for dtype in DTYPES:
        run = pairs_of(device, dtype, **form)
        for loss in LOSSES:
            found, usual = run(pair_errors, loss, False), run(pair_errors_reference, loss, False)
            exact = run(pair_errors_reference, loss, True)
            for label, a, b, truth in zip(("logit", "loss", "gradient"), found, usual, exact):
                kernel, plain = ((x.double().cpu() - truth).abs().max().item() for x in (a, b))
                floor = 4 * torch.finfo(a.dtype).eps * truth.abs().max().item()
                yield row_of(f"pair_errors {name}, {loss}, {label}", dtype, kernel, plain, floor)


def pairs_of(
    device: torch.device,
    dtype: torch.dtype,
    pairs: int = 5,
    velocity: bool = False,
    given: bool = False,
    recorded: bool = False,
    channels_last: bool = False,
) -> Callable[[Callable, str, bool], list[Tensor]]:
    """A function of (the op, the shape of the loss, whether in float64 on the CPU) that gives logit, loss and gradient."""
    torch.manual_seed(1)
    index = torch.arange(pairs, device=device)
    policy = torch.randn(2 * pairs, 4, 17, 9, device=device).to(dtype)
    reference = policy + (0.05 * torch.randn_like(policy.float())).to(dtype)
    if channels_last:
        policy, reference = (x.to(memory_format=torch.channels_last) for x in (policy, reference))
    target, latents = (torch.randn_like(policy.float()) for _ in range(2))
    errors_read = torch.rand(2, pairs, device=device)
    of_noise = torch.linspace(0.1, 1, 1000, device=device)
    prob, usable = torch.rand(pairs, device=device) / 2 + 0.5, torch.ones(pairs, device=device)
    usable[3:4] = 0
    weight, correction = torch.rand(1000, device=device) + 0.5, torch.rand(1000, device=device) * 1e-3
    slopes = torch.linspace(0.2, 1.7, pairs, device=device)
    seed, beta = torch.tensor(3, device=device), torch.tensor(50.0, device=device)

    def run(f: Callable, loss: str, wide: bool) -> list[Tensor]:
        def cast(x: Tensor) -> Tensor:
            return x.double().cpu() if wide and x.is_floating_point() else x.cpu() if wide else x

        leaf = cast(policy).detach().clone().requires_grad_()
        how: dict[str, Any] = {"recorded": cast(errors_read)} if recorded else {"reference": cast(reference)}
        how |= {"target": cast(target)} if given else {"noise": (cast(index * 11), cast(index), cast(seed))}
        if velocity:
            how |= {"latents": cast(latents), "of_noise": cast(of_noise), "of_data": cast(-of_noise)}
        t, p, u = cast(index * 13), cast(prob), cast(usable)
        errors = f(leaf, t, p, u, cast(weight), cast(correction), cast(beta), **how)
        out = pair_loss(errors, p, u, t, shape=loss)
        (grad,) = torch.autograd.grad((out.loss * cast(slopes)).sum(), leaf)
        return [out.logit, out.loss.detach(), grad]

    return run


def adamw8bit(device: torch.device) -> Iterator[dict[str, Any]]:
    """Weights after five updates on the device and in plain torch on the CPU, against the same in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(4)
        start = [torch.randn(shape).to(dtype) for shape in ((129, 257), (5003,), (7,), (33, 64, 3, 3))]
        grads = [[torch.randn_like(p) * 0.1 for p in start] for _ in range(5)]
        made: list[list[Tensor]] = []
        for where in (device, torch.device("cpu")):
            weights = [p.to(where, copy=True).requires_grad_() for p in start]
            updates = AdamW8bit(weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, seed=5)
            for step in grads:
                for p, grad in zip(weights, step):
                    p.grad = grad.to(where, copy=True)
                updates.step()
            made.append([p.detach().cpu().double() for p in weights])
        exact = [p.double().requires_grad_() for p in start]
        plain = torch.optim.AdamW(exact, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
        for step in grads:
            for p, grad in zip(exact, step):
                p.grad = grad.double()
            plain.step()
        kernel, usual = (max((w - e.detach()).abs().max().item() for w, e in zip(weights, exact)) for weights in made)
        yield row_of("AdamW8bit, five updates", dtype, kernel, usual, 0.0)


def beyond(device: torch.device, op: str, elements: int) -> Iterator[dict[str, Any]]:
    """The last rows of a tensor of so many elements, and the same rows alone: equal."""
    name, dtype = f"{op}, {elements:.2g} elements", torch.bfloat16
    if device.type == "cuda" and (free := torch.cuda.mem_get_info(device)[0]) < 12 * elements:
        yield {
            "check": name,
            "failed": f"not tried: {free / 2**30:.0f} GiB are free, it takes {12 * elements / 2**30:.0f}",
        }
        return
    torch.manual_seed(6)
    run, shape, pairs = OPS[op]
    rows = -(-elements // (2 * pairs * shape.numel())) * 2 * pairs
    x = torch.randn(256 if rows >= 256 else 2, *shape, device=device).to(dtype)
    whole = x.repeat(-(-rows // len(x)), *[1] * len(shape))[:rows]
    del x
    last = slice(rows - 1, rows)
    found = run(whole)
    if pairs == 2:  # the last pair is the last winner and the last loser
        last = slice(rows // 2 - 1, None, rows // 2)
    alone = run(whole[last].contiguous(), rows // 2 - 1)
    kept = found[-1:] if found.ndim == 1 else found[last]
    error = (kept.float() - alone.float()).abs().max().item()
    floor = 2 * torch.finfo(dtype).eps * alone.float().abs().max().item()
    yield row_of(name, dtype, error, 0.0, 0.0 if pairs == 2 else floor)


def _noised(x: Tensor, first: int = 0) -> Tensor:
    index = torch.arange(first, first + len(x) // 2, device=x.device)
    half = torch.full((1000,), 0.5, device=x.device)
    return noise_pairs(x, index % 1000, half, half, index, index % 7, torch.tensor(3, device=x.device))


def _errors(x: Tensor, first: int = 0) -> Tensor:
    index = torch.arange(first, first + len(x) // 2, device=x.device)
    one = torch.ones(len(index), device=x.device)
    table = torch.ones(1000, device=x.device)
    keys = (index, index % 7, torch.tensor(3, device=x.device))
    recorded = torch.zeros(2, len(index), device=x.device)
    return pair_errors(x, index % 1000, one, one, table, 0 * table, 1.0, recorded=recorded, noise=keys).errors[0]


def _normed(x: Tensor, first: int = 0) -> Tensor:
    one = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
    return group_norm_silu(x.to(memory_format=torch.channels_last), one, 0 * one, 32)


def _layer(x: Tensor, first: int = 0) -> Tensor:
    one = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
    return layer_norm(x, one, 0 * one)


OPS: dict[str, tuple[Callable[..., Tensor], torch.Size, int]] = {  # op, shape of a row, images of a pair
    "noise_pairs": (_noised, torch.Size((4, 128, 128)), 2),
    "pair_errors": (_errors, torch.Size((4, 256, 256)), 2),
    "geglu": (lambda x, first=0: geglu(x), torch.Size((64, 2560)), 1),
    "group_norm_silu": (_normed, torch.Size((320, 64, 64)), 1),
    "layer_norm": (_layer, torch.Size((77, 1280)), 1),
}

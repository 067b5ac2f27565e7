"""GEGLU's kernels in the interpreter against float64: at most twice plain torch's own error, and the same bits every
time.
"""

import pytest
import torch
import torch.nn.functional as F

from csrc_triton.geglu import _launch_backward, _launch_forward

QUICK = [(3, 7, torch.float32), (5, 320, torch.bfloat16), (9, 1280, torch.float16), (2, 301, torch.bfloat16)]
FULL = [
    (M, D, dtype)
    for M in (1, 2, 37, 64)
    for D in (1, 24, 129, 1280, 2560, 5120)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


def plain(proj):
    h, gate = proj.chunk(2, dim=-1)
    return h * F.gelu(gate)


def run(M, D, dtype, no_worse):
    generator = torch.Generator().manual_seed(M * D)
    proj = (3 * torch.randn(M, 2 * D, generator=generator)).to(dtype).requires_grad_()
    grad = torch.randn(M, D, generator=generator).to(dtype)
    exact_proj = proj.detach().double().requires_grad_()
    exact, plain_out = plain(exact_proj), plain(proj)
    exact.backward(grad.double())
    plain_out.backward(grad)
    out = _launch_forward(proj.detach())
    d_proj = _launch_backward(grad, proj.detach())
    no_worse(out, plain_out.detach(), exact.detach())
    no_worse(d_proj, proj.grad, exact_proj.grad)
    assert torch.equal(out, _launch_forward(proj.detach())) and torch.equal(
        d_proj, _launch_backward(grad, proj.detach())
    )


@pytest.mark.parametrize("M, D, dtype", QUICK)
def test_forward_and_backward(M, D, dtype, no_worse):
    run(M, D, dtype, no_worse)


@pytest.mark.slow
@pytest.mark.parametrize("M, D, dtype", FULL)
def test_full_grid(M, D, dtype, no_worse):
    run(M, D, dtype, no_worse)

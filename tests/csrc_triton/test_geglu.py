"""GEGLU on the CPU: float64, opcheck, gradcheck, compilation."""

import torch
import torch.nn.functional as F

from csrc_triton.geglu import _geglu, geglu


def plain(proj):
    h, gate = proj.chunk(2, dim=-1)
    return h * F.gelu(gate)


def test_value_and_gradient(no_worse):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        proj = (3 * torch.randn(4, 9, 130, generator=torch.Generator().manual_seed(0))).to(dtype)
        leaves = [proj.clone().requires_grad_(), proj.clone().requires_grad_(), proj.double().requires_grad_()]
        outs = [geglu(leaves[0]), plain(leaves[1]), plain(leaves[2])]
        for out in outs:
            out.sum().backward()
        no_worse(*(out.detach() for out in outs))
        no_worse(*(leaf.grad for leaf in leaves))


def test_opcheck_and_gradcheck():
    torch.library.opcheck(_geglu.registered, (torch.randn(3, 5, 8, requires_grad=True),))
    torch.library.opcheck(_geglu.registered, (torch.randn(8, 6).t().requires_grad_(),))  # non-contiguous
    assert torch.autograd.gradcheck(geglu, (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True),))


def test_compiles_without_graph_break():
    proj = torch.randn(5, 16, requires_grad=True)
    compiled = torch.compile(lambda x: geglu(x * 2).sum(), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(geglu(proj * 2).sum(), proj)
    (actual,) = torch.autograd.grad(compiled(proj), proj)
    assert torch.equal(actual, expected)

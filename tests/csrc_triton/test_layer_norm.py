"""LayerNorm on the CPU, with and without the residual add: float64, opcheck, gradcheck, compilation."""

import pytest
import torch
import torch.nn.functional as F

from csrc_triton.layer_norm import _add_layer_norm, _layer_norm, add_layer_norm, layer_norm


def leaf(*shape, dtype=torch.float32, seed=0, shift=0.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_value_and_gradient(dtype, offset, no_worse):
    leaves = [
        leaf(3, 17, 70, dtype=dtype, shift=offset),
        leaf(3, 17, 70, dtype=dtype, seed=1),
        leaf(70, dtype=dtype),
        leaf(70, dtype=dtype),
    ]

    def plain(x, r, w, b):
        return x + r, F.layer_norm(x + r, (70,), w, b, 1e-5)

    def run(function, inputs):
        s, y = function(*inputs)
        gradients = torch.autograd.grad((s.sin() + y.cos()).sum(), inputs)
        return s.detach(), y.detach(), *gradients

    results = [
        run(add_layer_norm, leaves),
        run(plain, leaves),
        run(plain, [x.detach().double().requires_grad_() for x in leaves]),
    ]
    for ours, theirs, exact in zip(*results, strict=True):
        no_worse(ours, theirs, exact)


def test_without_residual_is_the_same_normalisation():
    x, w, b = leaf(4, 40), leaf(40, seed=1), leaf(40, seed=2)
    assert torch.equal(layer_norm(x, w, b), add_layer_norm(x, torch.zeros_like(x), w, b)[1])


def test_opcheck_and_gradcheck():
    w, b = leaf(8), leaf(8)
    torch.library.opcheck(_layer_norm.registered, (leaf(3, 5, 8), w, b, 1e-5))
    torch.library.opcheck(
        _add_layer_norm.registered, (leaf(3, 8), leaf(8, 3).detach().t().requires_grad_(), w.detach(), b.detach(), 1e-5)
    )
    x, r, w, b = (
        leaf(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(2, 3, 7), (2, 3, 7), (7,), (7,)])
    )
    assert torch.autograd.gradcheck(layer_norm, (x, w, b))
    assert torch.autograd.gradcheck(add_layer_norm, (x, r, w, b))
    assert torch.autograd.gradcheck(
        lambda x: layer_norm(x, w.detach(), b.detach()), (x,)
    )  # frozen weights, as under LoRA


def test_compiles_without_graph_break():
    inputs = [leaf(5, 16), leaf(5, 16, seed=1), leaf(16, seed=2), leaf(16, seed=3)]

    def function(x, r, w, b):
        s, y = add_layer_norm(x * 2, r, w, b)
        return (s * layer_norm(y, w, b)).sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

"""GroupNorm + SiLU on the CPU: float64, layouts, opcheck, gradcheck, compilation."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton.group_norm_silu import _grid, _group_norm_silu, _run_pixels, group_norm_silu


def leaf(*shape, dtype=torch.float32, seed=0, shift=0.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift).to(dtype).requires_grad_()


def plain(x, w, b, temb=None):
    return F.silu(F.group_norm(x if temb is None else x + temb[:, :, None, None], 8, w, b, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_temb", [False, True])
def test_value_and_gradient(dtype, with_temb, no_worse):
    shapes = [(3, 24, 9, 7), (24,), (24,)] + [(3, 24)] * with_temb
    leaves = [leaf(*shape, dtype=dtype, seed=i, shift=5.0 * (i == 0)) for i, shape in enumerate(shapes)]

    def run(function, inputs):
        y = function(*inputs)
        return y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)

    def ours(x, w, b, temb=None):
        return group_norm_silu(x, w, b, 8, 1e-5, temb)

    results = [
        run(ours, leaves),
        run(plain, leaves),
        run(plain, [x.detach().double().requires_grad_() for x in leaves]),
    ]
    for actual, theirs, exact in zip(*results, strict=True):
        no_worse(actual, theirs, exact)


@pytest.mark.parametrize("with_temb", [False, True])
def test_under_gradient_checkpointing(with_temb):
    x, temb, w, b = leaf(2, 8, 3, 5), leaf(2, 8, seed=1), leaf(8, seed=2), leaf(8, seed=3)

    def function(x, temb, w, b):
        return group_norm_silu(x, w, b, 4, 1e-5, temb if with_temb else None).sin().sum()

    leaves = [x, temb, w, b] if with_temb else [x, w, b]
    expected = torch.autograd.grad(function(x, temb, w, b), leaves)
    again = torch.utils.checkpoint.checkpoint(function, x, temb, w, b, use_reentrant=False)
    assert all(torch.equal(a, e) for a, e in zip(torch.autograd.grad(again, leaves), expected, strict=True))


def test_backward_makes_no_zeros_for_the_statistics():
    calls = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    x, w, b, temb = leaf(2, 8, 3, 5), leaf(8), leaf(8), leaf(2, 8)
    y = group_norm_silu(x, w, b, 4, 1e-5, temb)
    dy = torch.ones_like(y)
    with Recorded():
        torch.autograd.grad(y, (x, w, b, temb), dy)
    assert [name for name in calls if "detach" not in name] == ["csrc_triton.group_norm_silu_backward.default"]


def test_every_layout_gives_the_same_values_in_channels_last():
    x, w, b = leaf(2, 16, 6, 5).detach(), leaf(16).detach(), leaf(16).detach()
    contiguous = group_norm_silu(x, w, b, 8)
    assert contiguous.is_contiguous(memory_format=torch.channels_last)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(group_norm_silu(other, w, b, 8), contiguous, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "turns", "runs"), [(20, 1, 1), (64, 1, 2), (600, 2, 10), (4096, 8, 16), (16384, 8, 64)]
)
def test_gradients_of_small_images_keep_their_programs(pixels, turns, runs):
    """Eight tiles of 32 pixels to a run, fewer where an image would have less than eight runs."""
    assert _run_pixels(pixels, 32) == turns * 32
    assert _grid(3, pixels, 320, turns * 32, 64) == (5, runs, 3)


@pytest.mark.long
def test_opcheck_and_gradcheck():
    w, b = leaf(8), leaf(8)
    torch.library.opcheck(_group_norm_silu.registered, (leaf(2, 8, 1, 1), leaf(2, 8), w, b, 4, 1e-5, True))
    channels_last = leaf(2, 8, 3, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(_group_norm_silu.registered, (channels_last, None, w.detach(), b.detach(), 4, 1e-5, False))
    shapes = [(2, 4, 3, 2), (4,), (4,), (2, 4)]
    x, w, b, temb = (leaf(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes))
    for silu in (True, False):
        assert torch.autograd.gradcheck(lambda x, w, b, t: group_norm_silu(x, w, b, 2, 1e-5, t, silu), (x, w, b, temb))  # noqa: B023
        assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, w, b, 2, 1e-5, None, silu), (x, w, b))  # noqa: B023
    assert torch.autograd.gradcheck(lambda x: group_norm_silu(x, w.detach(), b.detach(), 2), (x,))


def test_compiles_without_graph_break():
    inputs = [leaf(2, 8, 3, 5), leaf(8), leaf(8), leaf(2, 8)]

    def function(x, w, b, temb):
        return (group_norm_silu(x * 2, w, b, 4, 1e-5, temb) * group_norm_silu(x.sin(), w, b, 2, silu=False)).sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)

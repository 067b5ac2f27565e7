"""GroupNorm + SiLU in the interpreter against float64: at most twice plain torch's own error, and the same bits every
time.
"""

import pytest
import torch
import torch.nn.functional as F

from csrc_triton.group_norm_silu import _launch_backward, _launch_forward

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
QUICK = [  # an interpreted program takes long, and there is one an image and group
    # N, C, H, W, groups, dtype, weight dtype, offset, with temb, silu
    (1, 8, 3, 5, 4, FP32, FP32, 0.0, True, True),
    (2, 160, 9, 15, 16, BF16, FP32, 0.0, True, True),
    (1, 96, 17, 11, 16, FP16, FP16, 5.0, True, False),
    # from 512 pixels on a program sums several tiles: the last run has one, then two, of which the second is cut short
    (1, 32, 23, 29, 16, FP32, FP32, 300.0, False, True),
    (1, 40, 30, 23, 8, FP16, FP16, 0.0, False, True),
    (5, 12, 1, 3, 4, BF16, BF16, 10.0, False, True),
    (2, 48, 7, 11, 16, FP32, FP32, 20.0, False, True),
    (3, 24, 5, 9, 6, BF16, FP32, 2.0, False, False),
    # one gradient of temb sums far: 64 rows in sequence are too coarse for it
    (1, 320, 16, 16, 32, FP32, FP32, 0.0, True, True),
]
FULL = [
    (N, C, H, W, 32, dtype, weight_dtype, offset, with_temb, silu)
    for N in (1, 3)
    for C, H, W in ((320, 16, 16), (320, 7, 31), (640, 9, 5), (1280, 8, 8), (960, 3, 7), (64, 41, 27))
    for dtype, weight_dtype in ((FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32))
    for offset in (0.0, 50.0)
    for with_temb, silu in ((True, True), (False, True), (False, False))
]


def plain(x, temb, weight, bias, groups, silu):
    """Eager torch; half inputs with fp32 weights are what autocast runs: add in half, norm and SiLU in fp32, one
    rounding.
    """
    u = x if temb is None else x + temb[:, :, None, None]
    y = F.group_norm(u.to(torch.promote_types(x.dtype, weight.dtype)), groups, weight, bias, 1e-5)
    return (F.silu(y) if silu else y).to(x.dtype)


def run(N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu, no_worse, again=True):
    generator = torch.Generator().manual_seed(C * H * W)

    def draw(*shape, scale=1.0, shift=0.0, dtype=dtype):
        return (scale * torch.randn(shape, generator=generator) + shift).to(dtype)

    x = draw(N, C, H, W, shift=offset).to(memory_format=torch.channels_last)
    temb = draw(N, C) if with_temb else None
    weight, bias = draw(C, scale=0.3, shift=1.0, dtype=weight_dtype), draw(C, dtype=weight_dtype)
    dy = draw(N, C, H, W).to(memory_format=torch.channels_last)

    def gradients(dtype_of):
        leaves = [None if a is None else dtype_of(a).requires_grad_() for a in (x, temb, weight, bias)]
        y = plain(*leaves, groups, silu)
        y.backward(dtype_of(dy))
        return y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)

    exact, eager = gradients(lambda a: a.detach().double()), gradients(lambda a: a.detach().clone())
    y, mean, rstd, centre = _launch_forward(x, temb, weight, bias, groups, 1e-5, silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    backward = _launch_backward(dy, x, temb, weight, bias, mean, rstd, centre, silu, True)
    actual = (y, backward[0], *([backward[1]] if with_temb else []), *backward[2:])
    for ours, theirs, reference in zip(actual, eager, exact, strict=True):
        no_worse(ours, theirs, reference)
    if not again:
        return
    second = _launch_backward(dy, x, temb, weight, bias, mean, rstd, centre, silu, True)
    assert torch.equal(y, _launch_forward(x, temb, weight, bias, groups, 1e-5, silu)[0])
    assert all(torch.equal(a, b) for a, b in zip(backward, second, strict=True))
    frozen = _launch_backward(dy, x, temb, weight, bias, mean, rstd, centre, silu, False)
    assert torch.equal(frozen[0], backward[0]) and frozen[2].numel() == frozen[3].numel() == 0


@pytest.mark.parametrize("N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu", QUICK)
def test_forward_and_backward(N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu, no_worse):
    small = N * C * H * W < 50_000  # the full grid launches the large ones again too
    run(N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu, no_worse, again=small)


@pytest.mark.slow
@pytest.mark.parametrize("N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu", FULL)
def test_full_grid(N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu, no_worse):
    run(N, C, H, W, groups, dtype, weight_dtype, offset, with_temb, silu, no_worse)

"""LayerNorm's kernels in the interpreter against float64: at most twice plain torch's own error, and the same bits
every time.
"""

import pytest
import torch
import torch.nn.functional as F

from csrc_triton.layer_norm import _launch_backward, _launch_forward

HALF = (torch.bfloat16, torch.float16)
QUICK = [
    (65, 7, torch.float32, torch.float32, 0.0, True),  # a single row of 7 has too few values to compare largest errors
    (37, 320, torch.bfloat16, torch.float32, 0.0, True),
    (70, 640, torch.float16, torch.float16, 3.0, False),
    (33, 1280, torch.float32, torch.float32, 100.0, True),
    (5, 333, torch.bfloat16, torch.bfloat16, 10.0, False),
    (
        1,
        1280,
        torch.float16,
        torch.float32,
        30.0,
        False,
    ),  # the mean is off by its last digit: the backward has to correct it
]
FULL = [
    (M, C, dtype, weight_dtype, offset, residual)
    for M in (1, 5, 77, 300)
    for C in (8, 320, 333, 640, 1280)
    for dtype, weight_dtype in [(torch.float32, torch.float32), *((d, w) for d in HALF for w in (d, torch.float32))]
    for offset in (0.0, 30.0)
    for residual in (False, True)
]


def plain(x, residual, weight, bias):
    """(s, y) of eager torch; half inputs with fp32 weights are what autocast runs: fp32 normalisation, rounded at the
    end.
    """
    s = x if residual is None else x + residual
    wide = torch.promote_types(s.dtype, weight.dtype)
    return s, F.layer_norm(s.to(wide), s.shape[-1:], weight, bias, 1e-5).to(s.dtype)


def run(M, C, dtype, weight_dtype, offset, has_residual, no_worse):
    generator = torch.Generator().manual_seed(M * C)

    def draw(*shape, scale=1.0, shift=0.0, dtype=dtype):
        return (scale * torch.randn(shape, generator=generator) + shift).to(dtype)

    x, residual = draw(M, C, shift=offset), draw(M, C) if has_residual else None
    weight, bias = draw(C, scale=0.3, shift=1.0, dtype=weight_dtype), draw(C, dtype=weight_dtype)
    dy, dsum = draw(M, C), draw(M, C) if has_residual else None

    def gradients(dtype_of):
        leaves = [None if a is None else dtype_of(a).requires_grad_() for a in (x, residual, weight, bias)]
        s, y = plain(*leaves)
        loss = (y * dtype_of(dy)).sum() + (0 if dsum is None else (s * dtype_of(dsum)).sum())
        loss.backward()
        return s.detach(), y.detach(), leaves[0].grad, leaves[2].grad, leaves[3].grad

    exact, eager = gradients(lambda a: a.detach().double()), gradients(lambda a: a.detach().clone())
    s, y, mean, rstd = _launch_forward(x, residual, weight, bias, 1e-5)
    if has_residual:
        assert torch.equal(s, eager[0])
    s = x if s is None else s
    actual = (s, y, *_launch_backward(dy, dsum, s, weight, mean, rstd, True))
    for ours, theirs, reference in zip(actual, eager, exact, strict=True):
        # of a few numbers plain torch may round all to the last bit by chance: two units there are always allowed
        no_worse(ours, theirs, reference, floor=2 * torch.finfo(ours.dtype).eps * reference.abs().max().item())
    again = _launch_backward(dy, dsum, s, weight, mean, rstd, True)
    assert all(torch.equal(a, b) for a, b in zip(actual[2:], again, strict=True))
    frozen = _launch_backward(dy, dsum, s, weight, mean, rstd, False)
    assert torch.equal(frozen[0], actual[2]) and frozen[1].numel() == frozen[2].numel() == 0


@pytest.mark.parametrize("M, C, dtype, weight_dtype, offset, residual", QUICK)
def test_forward_and_backward(M, C, dtype, weight_dtype, offset, residual, no_worse):
    run(M, C, dtype, weight_dtype, offset, residual, no_worse)


@pytest.mark.slow
@pytest.mark.parametrize("M, C, dtype, weight_dtype, offset, residual", FULL)
def test_full_grid(M, C, dtype, weight_dtype, offset, residual, no_worse):
    run(M, C, dtype, weight_dtype, offset, residual, no_worse)

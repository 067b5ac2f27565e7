"""The dynamic 8-bit map of block-wise optimizer states: 256 levels in [-1, 1] (signed) or [0, 1], fine near zero.

Source: Dettmers et al., arXiv 2110.02861, section 1.2: seven decades; decade i = 0..6 covers (10^(i-7), 10^(i-6)) with
n_i = F 2^i levels in the middle of n_i equal steps, F = 1 for the signed map and 2 for the unsigned; 0 and 1 are levels
too, -1 is not.

Numbered k = n_i + j (j = 0..n_i - 1), with k = F - 1 for zero and k = 128 F for one, the levels lie on seven lines that
meet at the edges of the decades: the position of x in (0, 1) is

    L(x) = min over i of n_i (8/9 + 10^(6-i) x / 0.9),        k = floor(L(x))

a concave piecewise-linear function, so quantisation is seven multiply-adds and no search. Only the first level of a
decade needs care: it lies in the middle of a step five times as wide as the step below it, and the midpoint between the
two levels is a fifth of the wide step above the edge; likewise for the steps next to zero and to one.
"""

import torch

from csrc_triton.language import tl, triton

DECADES = 7


def _levels(signed: bool) -> torch.Tensor:
    """fp32 [256], ascending."""
    magnitudes = []
    for i in range(DECADES):
        n = (1 if signed else 2) * 2**i
        magnitudes += [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / n) for j in range(n)]
    negative = [-x for x in reversed(magnitudes)] if signed else []
    return torch.tensor([*negative, 0.0, *magnitudes, 1.0], dtype=torch.float64).float()


LEVELS = {signed: _levels(signed) for signed in (True, False)}
MIDPOINTS = {signed: (levels[1:] + levels[:-1]) / 2 for signed, levels in LEVELS.items()}


@triton.jit
def _position(x, F: tl.constexpr):
    """int32 number k of the level nearest to `x`, fp32 in [0, 1]."""
    position = x * (1.1111111111e6 * F) + 0.8888888889 * F  # i = 0
    position = tl.minimum(position, x * (2.2222222222e5 * F) + 1.7777777778 * F)
    position = tl.minimum(position, x * (4.4444444444e4 * F) + 3.5555555556 * F)
    position = tl.minimum(position, x * (8.8888888889e3 * F) + 7.1111111111 * F)
    position = tl.minimum(position, x * (1.7777777778e3 * F) + 14.2222222222 * F)
    position = tl.minimum(position, x * (3.5555555556e2 * F) + 28.4444444444 * F)
    position = tl.minimum(position, x * (7.1111111111e1 * F) + 56.8888888889 * F)
    k = position.to(tl.int32)
    first_of_decade = (k & (k - 1)) == 0
    edge = tl.where(
        k == F, 0.25 - F / 18.0, 0.2
    )  # midpoint towards the level below; towards zero for the very first level
    k = tl.where(first_of_decade & (position - k.to(tl.float32) < edge), k - 1, k)
    k = tl.where(position >= 128 * F - 0.25, 128 * F, k)
    return tl.maximum(k, F - 1)


@triton.jit
def _scaled(x, maximum):
    return x * tl.where(maximum > 0.0, tl.div_rn(1.0, tl.maximum(maximum, 1.1754943508222875e-38)), 0.0)


@triton.jit
def quantise_signed(x, maximum):
    """int32 codes of `x` [ROWS, BLOCK] relative to `maximum` [ROWS, 1] of the magnitudes."""
    k = _position(_scaled(tl.abs(x), maximum), 1)
    return tl.where(x < 0.0, 127 - tl.minimum(k, 127), 127 + k)


@triton.jit
def quantise_unsigned(x, maximum):
    """int32 codes of `x` >= 0; a positive x never takes code 0."""
    code = _position(_scaled(x, maximum), 2) - 1
    return tl.where(x > 0.0, tl.maximum(code, 1), 0)


def dequantise(codes: torch.Tensor, maxima: torch.Tensor, signed: bool) -> torch.Tensor:
    """uint8 [B, 256], fp32 [B] -> fp32 [B, 256]"""
    return LEVELS[signed].to(codes.device)[codes.int()] * maxima[:, None]


def quantise(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [B, 256] -> nearest codes uint8 [B, 256] and maxima fp32 [B]; a positive unsigned value never takes code 0."""
    maxima = values.abs().amax(1)
    scaled = values / maxima.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, MIDPOINTS[signed].to(values.device))
    return (codes if signed else torch.where(values > 0, codes.clamp_min(1), codes)).to(torch.uint8), maxima

"""Elementary functions from correctly rounded fp32 steps only, so that every device returns the same bits.

GPU logarithms and cosines differ between vendors, compilers and the C library. The functions here use additions,
multiplications, bit moves and (by their callers) the IEEE square root and division, in one fixed order, and no fused
multiply-add: kernels that use them are launched with `enable_fp_fusion=False`. Each exists twice, for Triton and for
torch, statement by statement the same. The polynomials are minimax fits made for this project (iteratively reweighted
least squares on Chebyshev nodes, relative weight), rounded to fp32; the fit error is below 1e-8, so that the fp32
rounding of the steps dominates (about one unit in the last place).
"""

import torch

from csrc_triton.language import tl, triton

LN2_HIGH = tl.constexpr(0.693145751953125)  # 12 significant bits: k * LN2_HIGH is exact for |k| < 2^12
LN2_LOW = tl.constexpr(1.4286068203094173e-06)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)  # fp32 bits of sqrt(1/2)

# log(1 + f) = f - f^2/2 + f^3 P(f) for 1 + f in [sqrt(1/2), sqrt(2)); highest power first
LOG_7 = tl.constexpr(-0.07634429633617401)
LOG_6 = tl.constexpr(0.12761549651622772)
LOG_5 = tl.constexpr(-0.131601944565773)
LOG_4 = tl.constexpr(0.14201761782169342)
LOG_3 = tl.constexpr(-0.16623356938362122)
LOG_2 = tl.constexpr(0.20001226663589478)
LOG_1 = tl.constexpr(-0.250008225440979)
LOG_0 = tl.constexpr(0.3333333134651184)
# sin(v pi/2) = v S(v^2), cos(v pi/2) = 1 + v^2 C(v^2) for |v| <= 1/2
SIN_4 = tl.constexpr(0.00015819507825654)
SIN_3 = tl.constexpr(-0.0046812607906758785)
SIN_2 = tl.constexpr(0.07969257980585098)
SIN_1 = tl.constexpr(-0.6459640860557556)
SIN_0 = tl.constexpr(1.5707963705062866)
COS_3 = tl.constexpr(0.0009040216100402176)
COS_2 = tl.constexpr(-0.02086028829216957)
COS_1 = tl.constexpr(0.25366923213005066)
COS_0 = tl.constexpr(-1.2337005138397217)


@triton.jit
def log_fp32(x):
    """Natural logarithm of a positive normal fp32 `x`; the Triton twin of `torch_log_fp32`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = LOG_7 * f + LOG_6
    p = p * f + LOG_5
    p = p * f + LOG_4
    p = p * f + LOG_3
    p = p * f + LOG_2
    p = p * f + LOG_1
    p = p * f + LOG_0
    k = exponent.to(tl.float32)
    return (f + (f * f) * (p * f - 0.5) + k * LN2_LOW) + k * LN2_HIGH


def torch_log_fp32(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of a positive normal fp32 tensor, with the bits of the Triton twin `log_fp32`."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS.value) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = LOG_7.value * f + LOG_6.value
    for coefficient in (LOG_5, LOG_4, LOG_3, LOG_2, LOG_1, LOG_0):
        p = p * f + coefficient.value
    k = exponent.to(torch.float32)
    return (f + (f * f) * (p * f - 0.5) + k * LN2_LOW.value) + k * LN2_HIGH.value


def torch_sqrt_rn(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded fp32 square root, as `tl.sqrt_rn`; torch's own on the CPU may be one unit off in the last
    place.

    By way of float64, where rounding twice is harmless: the root of a 24-bit number keeps 2^-51 away from every
    midpoint.
    """
    return x.double().sqrt().float()


@triton.jit
def cos_sin_turns(angle24):
    """(cos, sin) of 2 pi angle24 / 2^24 for an int32 `angle24` in [0, 2^24); the Triton twin of `torch_cos_sin_turns`.

    The reduction to a quarter turn is done in integers, hence exact.
    """
    quarter = (angle24 + (1 << 21)) >> 22
    v = (angle24 - (quarter << 22)).to(tl.float32) * (1.0 / (1 << 22))
    s = v * v
    p = SIN_4 * s + SIN_3
    p = p * s + SIN_2
    p = p * s + SIN_1
    p = p * s + SIN_0
    sine = v * p
    p = COS_3 * s + COS_2
    p = p * s + COS_1
    p = p * s + COS_0
    cosine = s * p + 1.0
    swap = (quarter & 1) == 1
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    s = tl.where((quarter & 2) == 2, -s, s)
    return c, s


def torch_cos_sin_turns(angle24: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of 2 pi angle24 / 2^24 for integers in [0, 2^24), fp32, with the bits of the Triton twin
    `cos_sin_turns`.
    """
    quarter = (angle24 + (1 << 21)) >> 22
    v = (angle24 - (quarter << 22)).to(torch.float32) * (1.0 / (1 << 22))
    s = v * v
    p = SIN_4.value * s + SIN_3.value
    for coefficient in (SIN_2, SIN_1, SIN_0):
        p = p * s + coefficient.value
    sine = v * p
    p = COS_3.value * s + COS_2.value
    for coefficient in (COS_1, COS_0):
        p = p * s + coefficient.value
    cosine = s * p + 1.0
    swap = (quarter & 1) == 1
    c, s = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return torch.where(((quarter + 1) & 2) == 2, -c, c), torch.where((quarter & 2) == 2, -s, s)

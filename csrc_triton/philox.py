"""Keyed random numbers: Philox-4x32-10, one definition, the same bits in Triton and in plain torch on every device.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3. A number is a pure
function of (pair key, draw, stream, seed, element):

    key     = (low 32 bits, high 32 bits) of the 64-bit pair key (int64, two's complement)
    counter = (element // 4, draw, stream, seed), each modulo 2^32
    word    = element % 4 of the four 32-bit words of that block

so that no generator has a state, and the numbers do not depend on batch size, order, worker or process. `element`
counts in the C-contiguous order of the shape that is asked for, whatever the memory layout of the tensor that the
number meets.

Normals: Box and Muller (1958) on words (0, 1) and (2, 3) of a block. The radius uses all 32 bits, u = fp32(word) 2^-32
+ 2^-33, so the tails reach sqrt(-2 log 2^-33) = 6.76 sigma; the angle uses the top 24 bits of the other word.
Logarithm, sine and cosine are those of `elementary.py`, so fp32 normals are equal bit for bit on all devices. With
dtype float64 the same uniforms are evaluated in float64.

Legend of shape suffixes: N keys, K elements per key, J = ceil(K / 4) blocks per key.
"""

import math
from enum import IntEnum

import torch

from csrc_triton.elementary import cos_sin_turns, log_fp32, torch_cos_sin_turns, torch_log_fp32, torch_sqrt_rn
from csrc_triton.language import tl, triton

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a number is for. The values are part of the counter: recorded runs depend on them, so new uses are appended."""

    NOISE = 0
    TIMESTEP = 1
    VAE_WIN = 2
    VAE_LOSE = 3
    DROPOUT = 4
    FLIP = 5
    CROP = 6
    ORDER = 7
    SPLIT = 8
    ROUNDING = 9
    LABEL = 10
    ADAPTER = 11  # with the number of an adapter's layer in the bits above the low 8: dpo/models/dropout.py


# ---------------------------------------------------------------------------------------------------------------- plain torch


def _multiply_32(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * constant, uint32 values in int64: 16-bit halves keep every product below 2^48."""
    low = a * (constant & 0xFFFF)
    middle = a * (constant >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _rounds(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        high0, low0 = _multiply_32(c0, MULTIPLIER_0.value)
        high1, low1 = _multiply_32(c2, MULTIPLIER_1.value)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL_0.value) & MASK, (k1 + WEYL_1.value) & MASK
    return c0, c1, c2, c3


def philox_4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10. counter: int64 [..., 4], key: int64 [..., 2] (broadcast), both holding uint32 values -> int64
    [..., 4].
    """
    assert counter.dtype == torch.int64 and key.dtype == torch.int64, (
        "counter and key hold uint32 values in int64 tensors"
    )
    assert counter.shape[-1] == 4 and key.shape[-1] == 2, (
        f"expected [..., 4] and [..., 2], got {counter.shape} and {key.shape}"
    )
    words = _rounds(*counter.unbind(-1), *key.unbind(-1))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def seed_tensor(seed: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """The seed as an int64 0-d tensor on `device`. A tensor elsewhere would need a copy that waits for the device:
    refused.
    """
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64, device=device)
    assert seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device, (
        f"the seed must be one int64 on {device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
    )
    return seed


def _blocks(keys, draws, stream, seed, blocks: int, first: int = 0):
    """The four words [N, J] of `blocks` counter blocks of every key, from block `first` on."""
    assert keys.dtype == torch.int64 and draws.dtype == torch.int64, (
        f"keys {keys.dtype} and draws {draws.dtype} must be int64"
    )
    assert keys.ndim == 1 and keys.shape == draws.shape, (
        f"keys {tuple(keys.shape)} and draws {tuple(draws.shape)} must both be [N]"
    )
    assert 0 <= first <= first + blocks <= 2**32, "a draw holds at most 2^34 elements"
    device = keys.device
    block_1J = torch.arange(first, first + blocks, dtype=torch.int64, device=device)[None]
    draw_N1 = draws[:, None] & MASK
    stream_11 = torch.full((1, 1), int(stream), dtype=torch.int64, device=device)
    seed_11 = seed_tensor(seed, device).reshape(1, 1) & MASK
    return _rounds(block_1J, draw_N1, stream_11, seed_11, keys[:, None] & MASK, (keys[:, None] >> 32) & MASK)


def random_bits(
    keys: torch.Tensor, draws: torch.Tensor, stream: int, seed: torch.Tensor | int, count: int, first: int = 0
) -> torch.Tensor:
    """int64 [N, count] of uint32 values for keys [N] int64, draws [N] int64 and a seed (int64 0-d tensor or int).

    first: the number of the first element.
    """
    block, inside = divmod(first, 4)
    words = torch.stack(_blocks(keys, draws, stream, seed, -(-(inside + count) // 4), block), dim=-1)
    return words.flatten(1)[:, inside : inside + count]


def uniform(keys: torch.Tensor, draws: torch.Tensor, stream: int, seed: torch.Tensor | int, count: int) -> torch.Tensor:
    """fp32 [N, count] in [0, 1): the top 24 bits times 2^-24 (exact)."""
    return (random_bits(keys, draws, stream, seed, count) >> 8).to(torch.float32) * 2.0**-24


def integers(
    keys: torch.Tensor, draws: torch.Tensor, stream: int, seed: torch.Tensor | int, low: int, high: int
) -> torch.Tensor:
    """int64 [N], uniform on [low, high): low + floor(bits (high - low) / 2^32).

    No rejection, so one number always takes one word. Each value's probability differs from 1 / (high - low) by less
    than 2^-32: relative to it by less than (high - low) / 2^32, that is 2.4e-7 for 1000 timesteps.
    """
    span = high - low
    assert 0 < span < 2**31, f"empty or too wide a range: [{low}, {high})"
    return low + ((random_bits(keys, draws, stream, seed, 1)[:, 0] * span) >> 32)


def _box_muller(
    radius_word: torch.Tensor, angle_word: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    u = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    angle24 = angle_word >> 8
    if dtype == torch.float64:
        radius = torch.sqrt(-2.0 * torch.log(u.double()))
        angle = angle24.double() * (2.0 * math.pi * 2.0**-24)
        return radius * torch.cos(angle), radius * torch.sin(angle)
    radius = torch_sqrt_rn(-2.0 * torch_log_fp32(u))
    cosine, sine = torch_cos_sin_turns(angle24)
    return radius * cosine, radius * sine


def normal(
    keys: torch.Tensor,
    draws: torch.Tensor,
    stream: int,
    seed: torch.Tensor | int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normals [N, *shape] for keys [N] int64 and draws [N] int64.

    Evaluated in fp32 (then rounded to `dtype` if that is narrower), or in float64 from the same uniforms when dtype is
    float64.
    """
    count = math.prod(shape)
    w0, w1, w2, w3 = _blocks(keys, draws, stream, seed, -(-count // 4))
    numbers = torch.stack((*_box_muller(w0, w1, dtype), *_box_muller(w2, w3, dtype)), dim=-1)
    return numbers.flatten(1)[:, :count].reshape(-1, *shape).to(dtype)


# --------------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on uint32 values: four uint32 words, the bits of `philox_4x32`."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * MULTIPLIER_0  # one wide multiplication gives both halves
        product1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def random_words(
    block,  # integers: element // 4
    key,  # int64: the 64-bit pair key
    draw,  # int64
    seed,  # int64
    stream,  # int: a member of Stream
):
    """The four uint32 words of counter blocks `block`: word w of block j is element 4 j + w of `random_bits`."""
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    return philox_words(
        c0,
        zero + draw.to(tl.uint32),
        (zero + stream).to(tl.uint32),
        zero + seed.to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )


@triton.jit
def _box_muller_pair(radius_word, angle_word):
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    radius = tl.sqrt_rn(-2.0 * log_fp32(u))
    cosine, sine = cos_sin_turns((angle_word >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def normal_quads(block, key, draw, seed, stream):
    """Four fp32 tensors shaped like `block`: elements 4 j, 4 j + 1, 4 j + 2, 4 j + 3 of `normal`, the same bits."""
    w0, w1, w2, w3 = random_words(block, key, draw, seed, stream)
    n0, n1 = _box_muller_pair(w0, w1)
    n2, n3 = _box_muller_pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def normal_span(first_block, key, draw, seed, stream, COUNT: tl.constexpr):
    """fp32 [COUNT]: the normals of elements 4 first_block ... 4 first_block + COUNT - 1, in order. COUNT: a power of
    two >= 4.
    """
    block = first_block + tl.arange(0, COUNT // 4)
    n0, n1, n2, n3 = normal_quads(block, key, draw, seed, stream)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))

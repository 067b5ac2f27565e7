"""Triton kernels of `adamw8bit.py`, which holds the equations, the legend and the launches."""

from csrc_triton.dynamic_map import quantise_signed, quantise_unsigned
from csrc_triton.language import tl, triton
from csrc_triton.philox import random_words


@triton.jit
def begin_step_kernel(
    hyper_ptr,  # [G, 5] fp64: lr, beta1, beta2, eps, weight decay of each parameter group
    step_ptr,  # [1] int64, counted up
    found_inf_ptr,  # [1] fp32
    factors_ptr,  # [G, 8] fp32: beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, lr decay
    G,
    BLOCK_G: tl.constexpr,
):
    """One program: counts the step (unless a gradient was not finite), forms each group's factors in fp64, powers by
    squaring.
    """
    step = tl.load(step_ptr) + tl.where(tl.load(found_inf_ptr) == 0.0, 1, 0)
    tl.store(step_ptr, step)
    group = tl.arange(0, BLOCK_G)
    inside = group < G
    hyper = hyper_ptr + group * 5
    lr = tl.load(hyper, mask=inside, other=0.0)
    beta1 = tl.load(hyper + 1, mask=inside, other=0.0)
    beta2 = tl.load(hyper + 2, mask=inside, other=0.0)
    power1 = beta1 * 0.0 + 1.0
    power2 = power1
    square1 = beta1
    square2 = beta2
    exponent = step
    for _ in range(40):
        odd = (exponent & 1) == 1
        power1 = tl.where(odd, power1 * square1, power1)
        power2 = tl.where(odd, power2 * square2, power2)
        square1 *= square1
        square2 *= square2
        exponent = exponent >> 1
    factors = factors_ptr + group * 8
    tl.store(factors, beta1.to(tl.float32), mask=inside)
    tl.store(factors + 1, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(factors + 2, beta2.to(tl.float32), mask=inside)
    tl.store(factors + 3, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(factors + 4, (lr / (1.0 - power1)).to(tl.float32), mask=inside)
    tl.store(factors + 5, tl.div_rn(1.0, tl.sqrt_rn((1.0 - power2).to(tl.float32))), mask=inside)
    tl.store(factors + 6, tl.load(hyper + 3, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.store(factors + 7, (lr * tl.load(hyper + 4, mask=inside, other=0.0)).to(tl.float32), mask=inside)


@triton.jit
def _adamw(w, g, m, v, factors):
    """(w, m, v) after one step, fp32; `factors` points at the group's row of the table that `begin_step_kernel` writes."""
    m = tl.load(factors) * m + tl.load(factors + 1) * g
    v = tl.load(factors + 2) * v + tl.load(factors + 3) * (g * g)
    direction = tl.div_rn(m, tl.sqrt_rn(v) * tl.load(factors + 5) + tl.load(factors + 6))
    return w - (tl.load(factors + 4) * direction + tl.load(factors + 7) * w), m, v


@triton.jit
def _round_weight(w, first, key, step, seed, DTYPE: tl.constexpr, COUNT: tl.constexpr, STREAM: tl.constexpr):
    """`w` [ROWS, COUNT] fp32 in DTYPE; bf16 stochastically. `first` [ROWS]: element number of each row's start, a
    multiple of 4.

    Adding 16 random bits below the kept 16 and cutting them off rounds up with probability equal to the fraction cut:
    unbiased.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        quad = (first // 4)[:, None] + tl.arange(0, COUNT // 4)[None, :]
        w0, w1, w2, w3 = random_words(quad, key, step, seed, STREAM)
        random = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >> 16
        w = ((w.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return w.to(DTYPE)


@triton.jit
def _round_small(w, element, key, step, seed, DTYPE: tl.constexpr, STREAM: tl.constexpr):
    """`_round_weight` by the number of every element: a shard of a small tensor may begin inside a quad."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        w0, w1, w2, w3 = random_words(element // 4, key, step, seed, STREAM)
        place = element % 4
        random = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3))) >> 16
        w = ((w.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return w.to(DTYPE)


@triton.jit
def _program_tile(
    table_ptr, chunks_ptr, DTYPE: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """What this program works on: its row of the tensor table, and ROWS * BLOCK consecutive elements of that tensor."""
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.load(chunks_ptr + program * 2).to(tl.int64) * 7
    weight_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    grad_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(GRADIENT)), 16)
    count = tl.load(entry + 2)
    state = tl.load(entry + 3)
    first = (tl.load(chunks_ptr + program * 2 + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)) * BLOCK
    element = first[:, None] + tl.arange(0, BLOCK)[None, :]
    group, key, before = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    return weight_ptr, grad_ptr, count, state, group, key, before, first, element


@triton.jit
def adamw_8bit_kernel(
    table_ptr,  # [K, 7] int64: addresses of weight and gradient (0: none), elements, start (8-bit: in blocks), group, random key,
    # elements of the whole tensor before it
    chunks_ptr,  # [programs, 2] int32: row of the table, chunk of ROWS * BLOCK elements in that tensor
    factors_ptr,  # [G, 8] fp32
    step_ptr,  # [1] int64
    seed_ptr,  # [1] int64
    clip_ptr,  # [1] fp32
    inv_scale_ptr,  # [1] fp32
    found_inf_ptr,  # [1] fp32
    signed_map_ptr,  # [256] fp32
    unsigned_map_ptr,  # [256] fp32
    m_ptr,  # [A] uint8, A a multiple of BLOCK
    v_ptr,  # [A] uint8
    m_max_ptr,  # [A / BLOCK] fp32
    v_max_ptr,  # [A / BLOCK] fp32
    DTYPE: tl.constexpr,  # of the weights
    GRADIENT: tl.constexpr,  # of the gradients
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,  # every tensor of the launch has a multiple of 16 elements
):
    """Dequantise, update, requantise: one read and one write of each of w, m, v, one read of g. Rows are quantisation
    blocks.
    """
    weight_ptr, grad_ptr, count, state, group, key, before, first, element = _program_tile(
        table_ptr, chunks_ptr, DTYPE, GRADIENT, ROWS, BLOCK
    )
    if (grad_ptr.to(tl.int64) == 0) | (tl.load(found_inf_ptr) != 0.0):
        return
    if ALIGNED:
        count = count // 16 * 16  # no change: tells the compiler that 16-byte accesses are never cut
    inside = element < count
    block = state + first // BLOCK
    state *= BLOCK
    row_inside = first < count
    g = tl.load(grad_ptr + element, mask=inside, other=0.0).to(tl.float32) * (
        tl.load(clip_ptr) * tl.load(inv_scale_ptr)
    )
    w = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
    m_code = tl.load(m_ptr + state + element, mask=inside, other=127).to(tl.int32)
    v_code = tl.load(v_ptr + state + element, mask=inside, other=0).to(tl.int32)
    m = tl.load(signed_map_ptr + m_code) * tl.load(m_max_ptr + block, mask=row_inside, other=0.0)[:, None]
    v = tl.load(unsigned_map_ptr + v_code) * tl.load(v_max_ptr + block, mask=row_inside, other=0.0)[:, None]
    w, m, v = _adamw(w, g, m, v, factors_ptr + group * 8)
    m = tl.where(inside, m, 0.0)
    v = tl.where(inside, v, 0.0)
    m_max = tl.max(tl.abs(m), axis=1)
    v_max = tl.max(v, axis=1)
    step, seed = tl.load(step_ptr), tl.load(seed_ptr)
    tl.store(weight_ptr + element, _round_weight(w, before + first, key, step, seed, DTYPE, BLOCK, STREAM), mask=inside)
    tl.store(m_ptr + state + element, quantise_signed(m, m_max[:, None]).to(tl.uint8), mask=inside)
    tl.store(v_ptr + state + element, quantise_unsigned(v, v_max[:, None]).to(tl.uint8), mask=inside)
    tl.store(m_max_ptr + block, m_max, mask=row_inside)
    tl.store(v_max_ptr + block, v_max, mask=row_inside)


@triton.jit
def adamw_fp32_kernel(
    table_ptr,  # [K, 7] int64, as above
    chunks_ptr,  # [programs, 2] int32, as above
    factors_ptr,  # [G, 8] fp32
    step_ptr,  # [1] int64
    seed_ptr,  # [1] int64
    clip_ptr,  # [1] fp32
    inv_scale_ptr,  # [1] fp32
    found_inf_ptr,  # [1] fp32
    m_ptr,  # [A] fp32
    v_ptr,  # [A] fp32
    DTYPE: tl.constexpr,  # of the weights
    GRADIENT: tl.constexpr,  # of the gradients
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same step for the small tensors, whose moments stay in fp32."""
    weight_ptr, grad_ptr, count, state, group, key, before, _first, element = _program_tile(
        table_ptr, chunks_ptr, DTYPE, GRADIENT, ROWS, BLOCK
    )
    if (grad_ptr.to(tl.int64) == 0) | (tl.load(found_inf_ptr) != 0.0):
        return
    inside = element < count
    g = tl.load(grad_ptr + element, mask=inside, other=0.0).to(tl.float32) * (
        tl.load(clip_ptr) * tl.load(inv_scale_ptr)
    )
    w = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + state + element, mask=inside, other=0.0)
    v = tl.load(v_ptr + state + element, mask=inside, other=0.0)
    w, m, v = _adamw(w, g, m, v, factors_ptr + group * 8)
    step, seed = tl.load(step_ptr), tl.load(seed_ptr)
    tl.store(weight_ptr + element, _round_small(w, before + element, key, step, seed, DTYPE, STREAM), mask=inside)
    tl.store(m_ptr + state + element, m, mask=inside)
    tl.store(v_ptr + state + element, v, mask=inside)

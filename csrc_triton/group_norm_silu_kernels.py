"""Triton kernels of `group_norm_silu.py`, which holds the equations, the legend and the launchers."""

from csrc_triton.language import libdevice, tl, triton


@triton.jit
def _place(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sample (int64), number of its run of pixels, and channels [1, BLOCK_C]. The grid is (tiles of
    channels, R, N).
    """
    tile = tl.program_id(0)  # within the grid, which the compiler has to be told to drop the masks of full tiles
    tl.assume(tile < (C + BLOCK_C - 1) // BLOCK_C)
    tl.assume(tile >= 0)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return tl.program_id(2).to(tl.int64), tl.program_id(1), channel


@triton.jit
def _tile(P, C: tl.constexpr, sample, first, channel, BLOCK_P: tl.constexpr):
    """Offsets and mask [BLOCK_P, BLOCK_C] of BLOCK_P pixels from `first` on."""
    row = tl.arange(0, BLOCK_P)[:, None]
    return (sample * P + first) * C + (row * C + channel), (row < P - first) & (channel < C)


@triton.jit
def _partial(partial_ptr, sample, run, channel, C: tl.constexpr):
    """Where this program's first sum of each channel belongs in [N, R, 2, C]; the second lies C behind it."""
    return partial_ptr + (sample * tl.num_programs(1) + run) * (2 * C) + channel


@triton.jit
def channel_statistics_kernel(
    x_ptr,  # [N, P, C]
    partial_ptr,  # [N, R, 2, C] fp32: mean and sum of squared deviations of each channel over each run
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, run, channel = _place(C, BLOCK_C)
    offsets, mask = _tile(P, C, sample, run * BLOCK_P, channel, BLOCK_P)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(P - run * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(x, axis=0, keep_dims=True) / count
    centred = tl.where(mask, x - mean, 0.0)
    partial = _partial(partial_ptr, sample, run, channel, C)
    tl.store(partial, mean, mask=channel < C)
    tl.store(partial + C, tl.sum(centred * centred, axis=0, keep_dims=True), mask=channel < C)


@triton.jit
def group_statistics_kernel(
    partial_ptr,  # [N, R, 2, C] fp32
    temb_ptr,  # [N, C], read when HAS_TEMB
    mean_ptr,  # [N, G] fp32
    rstd_ptr,  # [N, G] fp32
    centre_ptr,  # [N, C] fp32, written when HAS_TEMB: each channel's mean less its group's
    P,
    R,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    RUN_P: tl.constexpr,  # pixels per run
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per sample and group. With k pixels per run: M2 = sum of m2 + sum of k (mean of run and channel -
    mean)^2.
    """
    D: tl.constexpr = C // G
    sample = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    lane = tl.arange(0, BLOCK_D)
    channel = group * D + lane
    temb = tl.zeros([BLOCK_D], tl.float32)
    if HAS_TEMB:
        temb += tl.load(temb_ptr + sample * C + channel, mask=lane < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)[:, None]
        mask = (run < R) & (lane < D)[None, :]
        count = tl.where(mask, tl.minimum(P - run * RUN_P, RUN_P), 0).to(tl.float32)
        run_mean = tl.load(partial_ptr + (sample * R + run) * (2 * C) + channel[None, :], mask=mask, other=0.0)
        total += count * run_mean
    channel_mean = tl.where(lane < D, tl.sum(total, axis=0) / P + temb, 0.0)
    mean = tl.sum(channel_mean, axis=0) / D
    squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)[:, None]
        mask = (run < R) & (lane < D)[None, :]
        count = tl.where(mask, tl.minimum(P - run * RUN_P, RUN_P), 0).to(tl.float32)
        partial = partial_ptr + (sample * R + run) * (2 * C) + channel[None, :]
        gap = tl.load(partial, mask=mask, other=0.0) + temb[None, :] - mean
        squares += tl.load(partial + C, mask=mask, other=0.0) + count * (gap * gap)
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / (P * D)
    tl.store(mean_ptr + sample * G + group, mean)
    tl.store(rstd_ptr + sample * G + group, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))
    if HAS_TEMB:
        tl.store(centre_ptr + sample * C + channel, channel_mean - mean, mask=lane < D)


@triton.jit
def _channels(
    temb_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sample,
    channel,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
):
    """(centre, rstd, weight, bias), each [1, BLOCK_C] fp32: n = (x - centre) rstd, where centre = mean - temb."""
    inside = channel < C
    group = sample * G + channel // (C // G)
    centre = tl.load(mean_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_TEMB:
        centre -= tl.load(temb_ptr + sample * C + channel, mask=inside, other=0.0).to(tl.float32)
    return centre, rstd, weight, bias


@triton.jit
def _one_plus_exp(z):
    """1 + exp(-z) by the device's own exponential, which flushes what the 1 swallows anyway."""
    return 1.0 + libdevice.fast_expf(-z)


@triton.jit
def _dz(dy_ptr, offsets, mask, z, SILU: tl.constexpr):
    """Gradient of z: dy silu'(z), with silu'(z) = s + s (z - z s) and s = sigmoid(z). Zero where masked."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        s = libdevice.fast_dividef(1.0, _one_plus_exp(z))
        dy *= tl.fma(s, tl.fma(-z, s, z), s)
    return dy


@triton.jit
def group_norm_forward_kernel(
    x_ptr,  # [N, P, C]
    temb_ptr,  # [N, C], read when HAS_TEMB
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [N, G] fp32
    rstd_ptr,  # [N, G] fp32
    y_ptr,  # [N, P, C]
    P,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, run, channel = _place(C, BLOCK_C)
    offsets, mask = _tile(P, C, sample, run * BLOCK_P, channel, BLOCK_P)
    centre, rstd, weight, bias = _channels(
        temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, C, G, HAS_TEMB
    )
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - centre
    z = tl.fma(centred, rstd * weight, bias)
    if SILU:
        z = libdevice.fast_dividef(z, _one_plus_exp(z))
    tl.store(y_ptr + offsets, z, mask=mask)


@triton.jit
def channel_gradients_kernel(
    dy_ptr,  # [N, P, C]
    x_ptr,  # [N, P, C]
    temb_ptr,  # [N, C], read when HAS_TEMB
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [N, G] fp32
    rstd_ptr,  # [N, G] fp32
    partial_ptr,  # [N, R, 2, C] fp32: sums over each run of dz (u - mean) and of dz
    P,
    run_pixels,  # a multiple of BLOCK_P
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """First stage of every sum that the backward needs (see `group_gradients_kernel`). A run is several tiles, added
    in registers: what a program does once (indices, parameters, sums across threads) is spread over them.
    """
    sample, run, channel = _place(C, BLOCK_C)
    centre, rstd, weight, bias = _channels(
        temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, C, G, HAS_TEMB
    )
    scale = rstd * weight
    dz_centred = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dz_total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(run * run_pixels, tl.minimum((run + 1) * run_pixels, P), BLOCK_P):
        offsets, mask = _tile(P, C, sample, first, channel, BLOCK_P)
        centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - centre
        dz = _dz(dy_ptr, offsets, mask, tl.fma(centred, scale, bias), SILU)
        dz_centred = tl.fma(dz, centred, dz_centred)
        dz_total += dz
    partial = _partial(partial_ptr, sample, run, channel, C)
    tl.store(partial, tl.sum(dz_centred, axis=0, keep_dims=True), mask=channel < C)
    tl.store(partial + C, tl.sum(dz_total, axis=0, keep_dims=True), mask=channel < C)


@triton.jit
def group_gradients_kernel(
    partial_ptr,  # [N, R, 2, C] fp32
    weight_ptr,  # [C]
    rstd_ptr,  # [N, G] fp32
    centre_ptr,  # [N, C] fp32, read when HAS_TEMB
    sums_ptr,  # [N, 2, C] fp32: A and B below, each sample's dweight and dbias
    means_ptr,  # [N, G, 2] fp32: a and b below
    dtemb_ptr,  # [N, C], written when HAS_TEMB
    P,
    R,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Second stage, one program per sample and group. Over a channel's pixels A = sum of dz n, B = sum of dz. With g =
    weight dz:

        a = mean over the group of g n = sum of weight A / (P D),      b = mean over the group of g = sum of weight B / (P D)
        du = rstd (g - b - n a),                                       dweight = A and dbias = B, summed over samples

    since the statistics pass back the mean of g and its projection on n. Summed over a channel's pixels, du is temb's
    gradient:

        dtemb = rstd (weight B - P b - a sum of n),      sum over the pixels of n = P (channel mean - group mean) rstd
    """
    D: tl.constexpr = C // G
    sample = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    lane = tl.arange(0, BLOCK_D)
    channel = group * D + lane
    total_a = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total_b = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_R):
        run = start + tl.arange(0, BLOCK_R)[:, None]
        mask = (run < R) & (lane < D)[None, :]
        partial = partial_ptr + (sample * R + run) * (2 * C) + channel[None, :]
        total_a += tl.load(partial, mask=mask, other=0.0)
        total_b += tl.load(partial + C, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + sample * G + group)
    sum_a = rstd * tl.sum(total_a, axis=0)
    sum_b = tl.sum(total_b, axis=0)
    weight = tl.load(weight_ptr + channel, mask=lane < D, other=0.0).to(tl.float32)
    a = tl.sum(weight * sum_a, axis=0) / (P * D)
    b = tl.sum(weight * sum_b, axis=0) / (P * D)
    tl.store(sums_ptr + sample * (2 * C) + channel, sum_a, mask=lane < D)
    tl.store(sums_ptr + sample * (2 * C) + C + channel, sum_b, mask=lane < D)
    tl.store(means_ptr + (sample * G + group) * 2, a)
    tl.store(means_ptr + (sample * G + group) * 2 + 1, b)
    if HAS_TEMB:
        centre = tl.load(centre_ptr + sample * C + channel, mask=lane < D, other=0.0)
        dtemb = rstd * (weight * sum_b - P * (b + a * (centre * rstd)))
        tl.store(dtemb_ptr + sample * C + channel, dtemb, mask=lane < D)


@triton.jit
def group_norm_backward_kernel(
    dy_ptr,  # [N, P, C]
    x_ptr,  # [N, P, C]
    temb_ptr,  # [N, C], read when HAS_TEMB
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    mean_ptr,  # [N, G] fp32
    rstd_ptr,  # [N, G] fp32
    means_ptr,  # [N, G, 2] fp32
    dx_ptr,  # [N, P, C]
    P,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = du = rstd (weight dz - b - n a); n, z and dz are recomputed, so that x is all the forward keeps at full
    size.
    """
    sample, run, channel = _place(C, BLOCK_C)
    offsets, mask = _tile(P, C, sample, run * BLOCK_P, channel, BLOCK_P)
    centre, rstd, weight, bias = _channels(
        temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, C, G, HAS_TEMB
    )
    scale = rstd * weight
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - centre
    dz = _dz(dy_ptr, offsets, mask, tl.fma(centred, scale, bias), SILU)
    means = means_ptr + (sample * G + channel // (C // G)) * 2
    a = tl.load(means, mask=channel < C, other=0.0)
    b = tl.load(means + 1, mask=channel < C, other=0.0)
    dx = tl.fma(scale, dz, tl.fma(centred, -(rstd * rstd * a), -(rstd * b)))
    tl.store(dx_ptr + offsets, dx, mask=mask)

"""GroupNorm on channels_last activations, with an optional time-embedding add before it and an optional SiLU after it.

    u = x + temb[:, :, None, None],  n = (u - mean) rstd by sample and group,  z = n * weight + bias,  y = silu(z) = z sigmoid(z)

Sources: Wu and He, "Group Normalization" (arXiv 1803.08494); the order of operations is that of the residual blocks of Stable
Diffusion's UNet. Statistics are fp32 in two deterministic stages: mean and sum of squared deviations of each channel over a run
of pixels, each taken about its own mean in registers, then combined over runs and channels as Chan, Golub and LeVeque (1979)
combine subsets. Nothing is the difference of two large sums, so activations with a large offset keep their digits.

Layout rule: memory is [N, H, W, C] throughout. An input in another layout is copied once; every output is channels_last.
Legend: N samples, P = H * W pixels, C channels, G groups, D = C / G channels per group, R runs of BLOCK_P pixels.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import Specimen
from csrc_triton.layer_norm import sum_partials
from csrc_triton.runtime import PINNED, runs_triton, wide

WARPS = 8
BLOCK_C = 64  # 128 bytes of a half dtype; the channel counts of SD1.x and SDXL are multiples of it
TILE_STATISTICS = 8192  # elements per program: one operand, 32 values per thread
TILE = 4096  # elements per program where several operands are live
TILE_COMBINE = 1024  # elements per step of the second stages


@triton.jit
def _tile(P, C: tl.constexpr, R, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sample, run of pixels, channels [BLOCK_C], and offsets and mask [BLOCK_P, BLOCK_C]."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    channel = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    run = (pid // tiles_c) % R
    sample = (pid // tiles_c // R).to(tl.int64)
    pixel = run * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = (pixel < P) & (channel < C)[None, :]
    return sample, run, channel, sample * P * C + pixel.to(tl.int64) * C + channel[None, :], mask


@triton.jit
def channel_statistics_kernel(
    x_ptr,  # [N, P, C]
    partial_ptr,  # [N, R, 2, C] fp32: mean and sum of squared deviations of each channel over each run
    P,
    R,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, run, channel, offsets, mask = _tile(P, C, R, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(P - run * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(x, axis=0) / count
    centred = tl.where(mask, x - mean[None, :], 0.0)
    partial = partial_ptr + (sample * R + run) * (2 * C) + channel
    tl.store(partial, mean, mask=channel < C)
    tl.store(partial + C, tl.sum(centred * centred, axis=0), mask=channel < C)


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
    """One program per sample and group. With k pixels per run: M2 = sum of m2 + sum of k (mean of run and channel - mean)^2."""
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
def _normalised(
    x_ptr, temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, offsets, mask, C, G, HAS_TEMB: tl.constexpr
):
    """(n, z, weight, rstd) of a tile, all fp32: n and z [BLOCK_P, BLOCK_C], weight and rstd [BLOCK_C]."""
    inside = channel < C
    group = sample * G + channel // (C // G)
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_TEMB:
        u += tl.load(temb_ptr + sample * C + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    n = (u - mean[None, :]) * rstd[None, :]
    return n, n * weight[None, :] + bias[None, :], weight, rstd


@triton.jit
def _dz(dy_ptr, offsets, mask, z, SILU: tl.constexpr):
    """Gradient of z: dy silu'(z), with silu'(z) = s (1 + z (1 - s)) and s = sigmoid(z). Zero where masked."""
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        dy *= s * (1.0 + z * (1.0 - s))
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
    R,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, _, channel, offsets, mask = _tile(P, C, R, BLOCK_P, BLOCK_C)
    _, z, _, _ = _normalised(
        x_ptr, temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, offsets, mask, C, G, HAS_TEMB
    )
    if SILU:
        z = z / (1.0 + tl.exp(-z))
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
    partial_ptr,  # [N, R, 2, C] fp32: sums over each run of dz n and of dz
    P,
    R,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """First stage of every sum that the backward needs (see `group_gradients_kernel`)."""
    sample, run, channel, offsets, mask = _tile(P, C, R, BLOCK_P, BLOCK_C)
    n, z, _, _ = _normalised(
        x_ptr, temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, offsets, mask, C, G, HAS_TEMB
    )
    dz = _dz(dy_ptr, offsets, mask, z, SILU)
    partial = partial_ptr + (sample * R + run) * (2 * C) + channel
    tl.store(partial, tl.sum(dz * n, axis=0), mask=channel < C)
    tl.store(partial + C, tl.sum(dz, axis=0), mask=channel < C)


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
    """Second stage, one program per sample and group. Over a channel's pixels A = sum of dz n, B = sum of dz. With g = weight dz:

        a = mean over the group of g n = sum of weight A / (P D),      b = mean over the group of g = sum of weight B / (P D)
        du = rstd (g - b - n a),                                       dweight = A and dbias = B, summed over samples

    since the statistics pass back the mean of g and its projection on n. Summed over a channel's pixels, du is temb's gradient:

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
    sum_a = tl.sum(total_a, axis=0)
    sum_b = tl.sum(total_b, axis=0)
    weight = tl.load(weight_ptr + channel, mask=lane < D, other=0.0).to(tl.float32)
    a = tl.sum(weight * sum_a, axis=0) / (P * D)
    b = tl.sum(weight * sum_b, axis=0) / (P * D)
    tl.store(sums_ptr + sample * (2 * C) + channel, sum_a, mask=lane < D)
    tl.store(sums_ptr + sample * (2 * C) + C + channel, sum_b, mask=lane < D)
    tl.store(means_ptr + (sample * G + group) * 2, a)
    tl.store(means_ptr + (sample * G + group) * 2 + 1, b)
    if HAS_TEMB:
        rstd = tl.load(rstd_ptr + sample * G + group)
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
    R,
    C: tl.constexpr,
    G: tl.constexpr,
    HAS_TEMB: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = du = rstd (weight dz - b - n a); n, z and dz are recomputed, so that x is all the forward keeps at full size."""
    sample, _, channel, offsets, mask = _tile(P, C, R, BLOCK_P, BLOCK_C)
    n, z, weight, rstd = _normalised(
        x_ptr, temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sample, channel, offsets, mask, C, G, HAS_TEMB
    )
    dz = _dz(dy_ptr, offsets, mask, z, SILU)
    means = means_ptr + (sample * G + channel // (C // G)) * 2
    a = tl.load(means, mask=channel < C, other=0.0)
    b = tl.load(means + 1, mask=channel < C, other=0.0)
    tl.store(dx_ptr + offsets, rstd[None, :] * (weight[None, :] * dz - b[None, :] - n * a[None, :]), mask=mask)


def _blocks(P: int, C: int, tile: int) -> dict[str, int]:
    """Tile of the pixel-wise kernels: BLOCK_C channels, as many pixels as fill the tile (fewer where the image is smaller)."""
    block_c = min(BLOCK_C, triton.next_power_of_2(C))
    return {"BLOCK_P": min(tile // block_c, triton.next_power_of_2(P)), "BLOCK_C": block_c}


def _combine_blocks(C: int, G: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(C // G)
    return {"BLOCK_R": max(1, TILE_COMBINE // block_d), "BLOCK_D": block_d}


def _grid(N: int, P: int, C: int, blocks: dict[str, int]) -> tuple[tuple[int], int]:
    """(grid, runs per sample)"""
    runs = triton.cdiv(P, blocks["BLOCK_P"])
    return (N * runs * triton.cdiv(C, blocks["BLOCK_C"]),), runs


def _launch_forward(x, temb, weight, bias, groups, eps, silu):
    """(y, mean, rstd, centre) of a channels_last x; centre is empty without temb."""
    N, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    mean, rstd = x.new_empty((N, groups), dtype=torch.float32), x.new_empty((N, groups), dtype=torch.float32)
    centre = x.new_empty((N, C) if temb is not None else (0,), dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    embedding = x if temb is None else temb
    shape = {"C": C, "G": groups, "HAS_TEMB": temb is not None}

    blocks = _blocks(P, C, TILE_STATISTICS)
    grid, runs = _grid(N, P, C, blocks)
    partial = x.new_empty((N, runs, 2, C), dtype=torch.float32)
    channel_statistics_kernel[grid](x, partial, P, runs, C=C, **blocks, num_warps=WARPS, **PINNED)
    group_statistics_kernel[(N * groups,)](
        partial, embedding, mean, rstd, centre, P, runs, eps,
        **shape, RUN_P=blocks["BLOCK_P"], **_combine_blocks(C, groups), num_warps=4, **PINNED,
    )  # fmt: skip
    blocks = _blocks(P, C, TILE)
    grid, runs = _grid(N, P, C, blocks)
    group_norm_forward_kernel[grid](
        x, embedding, weight, bias, mean, rstd, y, P, runs, **shape, SILU=silu, **blocks, num_warps=WARPS, **PINNED
    )
    return y, mean, rstd, centre


def _launch_backward(dy, x, temb, weight, bias, mean, rstd, centre, silu, weight_grads):
    """(dx, dtemb, dweight, dbias); dtemb is empty without temb, the last two unless `weight_grads`."""
    N, C, P, groups = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
    embedding = x if temb is None else temb
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dtemb = x.new_empty(0) if temb is None else torch.empty_like(temb)
    shape = {"C": C, "G": groups, "HAS_TEMB": temb is not None}

    blocks = _blocks(P, C, TILE)
    grid, runs = _grid(N, P, C, blocks)
    partial = x.new_empty((N, runs, 2, C), dtype=torch.float32)
    channel_gradients_kernel[grid](
        dy, x, embedding, weight, bias, mean, rstd, partial, P, runs, **shape, SILU=silu, **blocks, num_warps=WARPS, **PINNED
    )
    sums, means = partial.new_empty((N, 2, C)), partial.new_empty((N, groups, 2))
    group_gradients_kernel[(N * groups,)](
        partial, weight, rstd, centre, sums, means, dtemb, P, runs, **shape, **_combine_blocks(C, groups), num_warps=4, **PINNED
    )
    group_norm_backward_kernel[grid](
        dy, x, embedding, weight, bias, mean, rstd, means, dx, P, runs, **shape, SILU=silu, **blocks, num_warps=WARPS, **PINNED
    )
    return dx, dtemb, *(sum_partials(sums, weight) if weight_grads else (weight.new_empty(0), weight.new_empty(0)))


def _per_channel(statistic: torch.Tensor, C: int) -> torch.Tensor:
    """[N, G] -> [N, C, 1, 1]"""
    return statistic.repeat_interleave(C // statistic.shape[1], dim=1)[:, :, None, None]


def _channels_last(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last).copy_(x)


def group_norm_silu_reference(x, temb, weight, bias, groups, eps, silu):
    """Plain torch form of the forward: (y, mean, rstd, centre), arithmetic in at least float32."""
    C = x.shape[1]
    u = wide(x) if temb is None else wide(x) + wide(temb)[:, :, None, None]
    var, mean = torch.var_mean(u.reshape(x.shape[0], groups, -1), dim=-1, correction=0)
    rstd = torch.rsqrt(var + eps)
    centred = u - _per_channel(mean, C)
    z = centred * _per_channel(rstd, C) * wide(weight)[:, None, None] + wide(bias)[:, None, None]
    centre = u.new_empty(0) if temb is None else centred.mean((2, 3))
    return _channels_last(z * torch.sigmoid(z) if silu else z, x.dtype), mean, rstd, centre


def group_norm_silu_backward_reference(dy, x, temb, weight, bias, mean, rstd, centre, silu, weight_grads):
    """Plain torch form of the backward: (dx, dtemb, dweight, dbias)."""
    C = x.shape[1]
    u = wide(x) if temb is None else wide(x) + wide(temb)[:, :, None, None]
    n = (u - _per_channel(mean, C)) * _per_channel(rstd, C)
    wide_weight, dz = wide(weight)[:, None, None], wide(dy)
    if silu:
        z = n * wide_weight + wide(bias)[:, None, None]
        s = torch.sigmoid(z)
        dz = dz * (s * (1.0 + z * (1.0 - s)))
    g = wide_weight * dz
    grouped = (x.shape[0], mean.shape[1], -1)
    a, b = (g * n).reshape(grouped).mean(-1), g.reshape(grouped).mean(-1)
    dx = _per_channel(rstd, C) * (g - _per_channel(b, C) - n * _per_channel(a, C))
    dtemb = x.new_empty(0) if temb is None else dx.sum((2, 3)).to(temb.dtype)
    dx = _channels_last(dx, x.dtype)
    if not weight_grads:
        return dx, dtemb, weight.new_empty(0), weight.new_empty(0)
    return dx, dtemb, (dz * n).sum((0, 2, 3)).to(weight.dtype), dz.sum((0, 2, 3)).to(weight.dtype)


@torch.library.custom_op("csrc_triton::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: torch.Tensor, temb: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    temb = None if temb is None else temb.contiguous()
    forward = _launch_forward if runs_triton(x) else group_norm_silu_reference
    x = x.contiguous(memory_format=torch.channels_last)
    return forward(x, temb, weight.contiguous(), bias.contiguous(), groups, eps, silu)


@torch.library.custom_op("csrc_triton::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    temb: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    centre: torch.Tensor,
    silu: bool,
    weight_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    temb = None if temb is None else temb.contiguous()
    backward = _launch_backward if runs_triton(x) else group_norm_silu_backward_reference
    dy, x = dy.contiguous(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return backward(dy, x, temb, weight.contiguous(), bias.contiguous(), mean, rstd, centre, silu, weight_grads)


@_group_norm_silu.register_fake
def _(x, temb, weight, bias, groups, eps, silu):
    statistic = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = x.new_empty((x.shape[0], groups), dtype=statistic), x.new_empty((x.shape[0], groups), dtype=statistic)
    centre = x.new_empty(x.shape[:2] if temb is not None else (0,), dtype=statistic)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd, centre


@_group_norm_silu_backward.register_fake
def _(dy, x, temb, weight, bias, mean, rstd, centre, silu, weight_grads):
    dtemb = x.new_empty(0) if temb is None else temb.new_empty(temb.shape)
    shape = weight.shape if weight_grads else (0,)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, dtemb, weight.new_empty(shape), weight.new_empty(shape)


def _setup_context(ctx, inputs, output):
    x, temb, weight, bias, _, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, temb, weight, bias, *output[1:])


def _backward(ctx, dy, dmean, drstd, dcentre):
    x, temb, *rest = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    weight_grads = any(ctx.needs_input_grad[2:4])
    dx, dtemb, dweight, dbias = _group_norm_silu_backward(dy, x, temb, *rest, ctx.silu, weight_grads)
    dtemb = None if temb is None else dtemb
    return (dx, dtemb, dweight, dbias, None, None, None) if weight_grads else (dx, dtemb, *[None] * 5)


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-5,
    temb: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """silu(group_norm(x + temb)), or group_norm(x + temb) when `silu` is False.

    Args:
        x: [N, C, H, W] float32, bfloat16 or float16 (float64 takes the torch path). channels_last, else it is copied once.
        weight, bias: [C], any floating dtype. temb: [N, C] or None.
        groups: divides C. eps: added to the variance.
    Returns:
        [N, C, H, W] in the dtype of `x`, channels_last. `x` is saved for the backward.
    """
    assert x.is_floating_point() and x.ndim == 4 and x.numel() > 0, f"x must be [N, C, H, W]: {x.dtype} {tuple(x.shape)}"
    assert x.shape[1] % groups == 0, f"{groups} groups do not divide {x.shape[1]} channels"
    assert weight.shape == bias.shape == x.shape[1:2], f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [C]"
    assert temb is None or temb.shape == x.shape[:2], f"temb {tuple(temb.shape)} must be {tuple(x.shape[:2])}"
    return _group_norm_silu(x, temb, weight, bias, groups, eps, silu)[0]


def _specimens(dtype: str, weight: str, P: int, C: int, G: int, temb: bool, silu: bool) -> list[Specimen]:
    """All kernels of one forward and backward: full-size tensors in `dtype`, parameters in `weight`, everything else fp32."""
    tile, runs, combine = _blocks(P, C, TILE), _blocks(P, C, TILE_STATISTICS), _combine_blocks(C, G)
    kinds = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "temb_ptr", "dtemb_ptr"), f"*{dtype}")
    kinds |= {"weight_ptr": f"*{weight}", "bias_ptr": f"*{weight}", "P": "i32", "R": "i32", "eps": "fp32"}
    values = {"C": C, "G": G, "HAS_TEMB": temb, "SILU": silu, "RUN_P": runs["BLOCK_P"]} | tile | combine
    specimens = []
    for kernel, blocks, warps, loads, stores in (
        (channel_statistics_kernel, runs, WARPS, True, False),
        (group_statistics_kernel, {}, 4, False, False),
        (group_norm_forward_kernel, tile, WARPS, True, True),
        (channel_gradients_kernel, tile, WARPS, True, False),
        (group_gradients_kernel, {}, 4, False, False),
        (group_norm_backward_kernel, tile, WARPS, True, True),
    ):
        constants = {p: v for p, v in (values | blocks).items() if p in kernel.arg_names}
        signature = {p: kinds.get(p, "*fp32") for p in kernel.arg_names if p not in constants}
        name = f"{kernel.__name__.removesuffix('_kernel')}_{P}x{C}"
        specimens.append(Specimen(name, kernel, dtype, signature, constants, warps, vector_load=loads, vector_store=stores))
    return specimens


AOT_SPECIMENS = [
    *_specimens("bf16", "fp32", 4096, 320, 32, temb=True, silu=True),
    *_specimens("fp16", "fp32", 4096, 320, 32, temb=True, silu=True),
    *_specimens("fp32", "fp32", 4096, 320, 32, temb=True, silu=True),
    *_specimens("bf16", "bf16", 64, 1280, 32, temb=False, silu=False),
]

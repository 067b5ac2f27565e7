"""GroupNorm on channels_last activations, with an optional time embedding added before it and an optional SiLU after
it.

    u = x or x + temb[:, :, None, None],
    n = (u - mean) rstd by sample and group,    z = n * weight + bias,    y = silu(z) = z sigmoid(z)

Sources: Wu and He, "Group Normalization" (arXiv 1803.08494); the order of operations is that of the residual blocks of
Stable Diffusion's UNet. Statistics are fp32 in two deterministic stages: mean and sum of squared deviations of each
channel over a run of pixels, each taken about its own mean in registers, then combined over runs and channels as Chan,
Golub and LeVeque (1979) combine subsets. Nothing is the difference of two large sums, so activations with a large
offset keep their digits.

Layout rule: memory is [N, H, W, C] throughout. An input in another layout is copied once; every output is
channels_last. Legend: N samples, P = H * W pixels, C channels, G groups, D = C / G channels per group, R runs of
pixels in an image.
"""

import torch

from csrc_triton.group_norm_silu_kernels import (
    channel_gradients_kernel,
    channel_statistics_kernel,
    group_gradients_kernel,
    group_norm_backward_kernel,
    group_norm_forward_kernel,
    group_statistics_kernel,
)
from csrc_triton.language import triton
from csrc_triton.layer_norm import sum_partials
from csrc_triton.op import op
from csrc_triton.runtime import PINNED, on_its_device, runs_triton, wide
from csrc_triton.specimen import Specimen

WARPS = 8
BLOCK_C = 64  # 128 bytes of a half dtype; the channel counts of SD1.x and SDXL are multiples of it
TILE_STATISTICS = 8192  # elements per program: one operand, 32 values per thread
TILE = 4096  # elements per program where several operands are live
TILE_GRADIENTS = 2048  # elements per step of a program that sums the channels' gradients, with half the warps
MAX_STEPS = 8  # of such a program
MIN_RUNS = 8  # such programs at least for each tile of channels of an image, rather than more steps
TILE_COMBINE = 1024  # elements per step of the second stages
FULL_SIZE = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "temb_ptr", "dtemb_ptr")  # in x's dtype


def _blocks(P: int, C: int, tile: int) -> dict[str, int]:
    """Tile of the pixel-wise kernels: BLOCK_C channels, as many pixels as fill the tile (fewer where the image is
    smaller).
    """
    block_c = min(BLOCK_C, triton.next_power_of_2(C))
    return {"BLOCK_P": min(tile // block_c, triton.next_power_of_2(P)), "BLOCK_C": block_c}


def _combine_blocks(C: int, G: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(C // G)
    return {"BLOCK_R": max(1, TILE_COMBINE // block_d), "BLOCK_D": block_d}


def _run_pixels(P: int, block_p: int) -> int:
    """Pixels whose gradients one program sums; fewer of a small image, so that enough programs remain."""
    return block_p * max(1, min(MAX_STEPS, P // (MIN_RUNS * block_p)))


def _grid(N: int, P: int, C: int, run_pixels: int, block_c: int) -> tuple[int, int, int]:
    """(tiles of channels, runs of pixels, samples)"""
    return triton.cdiv(C, block_c), triton.cdiv(P, run_pixels), N


@on_its_device
def _launch_forward(x, temb, weight, bias, groups, eps, silu):
    """(y, mean, rstd, centre) of a channels_last x; centre is empty without temb."""
    N, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    mean, rstd = x.new_empty((N, groups), dtype=torch.float32), x.new_empty((N, groups), dtype=torch.float32)
    centre = x.new_empty((N, C) if temb is not None else (0,), dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    embedding = x if temb is None else temb
    shape = {"C": C, "G": groups, "HAS_TEMB": temb is not None}

    blocks = _blocks(P, C, TILE_STATISTICS)
    grid = _grid(N, P, C, *blocks.values())
    runs = grid[1]
    partial = x.new_empty((N, runs, 2, C), dtype=torch.float32)
    channel_statistics_kernel[grid](x, partial, P, C=C, **blocks, num_warps=WARPS, **PINNED)
    group_statistics_kernel[(N * groups,)](
        partial, embedding, mean, rstd, centre, P, runs, eps,
        **shape, RUN_P=blocks["BLOCK_P"], **_combine_blocks(C, groups), num_warps=4, **PINNED,
    )  # fmt: skip
    blocks = _blocks(P, C, TILE)
    group_norm_forward_kernel[_grid(N, P, C, *blocks.values())](
        x, embedding, weight, bias, mean, rstd, y, P, **shape, SILU=silu, **blocks, num_warps=WARPS, **PINNED
    )
    return y, mean, rstd, centre


@on_its_device
def _launch_backward(dy, x, temb, weight, bias, mean, rstd, centre, silu, weight_grads):
    """(dx, dtemb, dweight, dbias); dtemb is empty without temb, the last two unless `weight_grads`."""
    N, C, P, groups = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
    embedding = x if temb is None else temb
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dtemb = x.new_empty(0) if temb is None else torch.empty_like(temb)
    shape = {"C": C, "G": groups, "HAS_TEMB": temb is not None}

    blocks = _blocks(P, C, TILE_GRADIENTS)
    run_pixels = _run_pixels(P, blocks["BLOCK_P"])
    grid = _grid(N, P, C, run_pixels, blocks["BLOCK_C"])
    runs = grid[1]
    partial = x.new_empty((N, runs, 2, C), dtype=torch.float32)
    channel_gradients_kernel[grid](
        dy, x, embedding, weight, bias, mean, rstd, partial, P, run_pixels,
        **shape, SILU=silu, **blocks, num_warps=WARPS // 2, **PINNED,
    )  # fmt: skip
    sums, means = partial.new_empty((N, 2, C)), partial.new_empty((N, groups, 2))
    group_gradients_kernel[(N * groups,)](
        partial, weight, rstd, centre, sums, means, dtemb, P, runs,
        **shape, **_combine_blocks(C, groups), num_warps=4, **PINNED,
    )  # fmt: skip
    blocks = _blocks(P, C, TILE)
    group_norm_backward_kernel[_grid(N, P, C, *blocks.values())](
        dy, x, embedding, weight, bias, mean, rstd, means, dx, P,
        **shape, SILU=silu, **blocks, num_warps=WARPS, **PINNED,
    )  # fmt: skip
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


@op("group_norm_silu")
def _group_norm_silu(
    x: torch.Tensor,
    temb: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    temb = None if temb is None else temb.contiguous()
    forward = _launch_forward if runs_triton(x) else group_norm_silu_reference
    return forward(x, temb, weight.contiguous(), bias.contiguous(), groups, eps, silu)


@op("group_norm_silu_backward")
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
    mean, rstd = (
        x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)
    )
    centre = x.new_empty(x.shape[:2] if temb is not None else (0,), dtype=mean.dtype)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd, centre


@_group_norm_silu_backward.register_fake
def _(dy, x, temb, weight, bias, mean, rstd, centre, silu, weight_grads):
    dtemb = x.new_empty(0) if temb is None else temb.new_empty(temb.shape)
    shape = weight.shape if weight_grads else (0,)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, dtemb, weight.new_empty(shape), weight.new_empty(shape)


def _setup_context(ctx, inputs, output):
    x, temb, weight, bias, _, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # the statistics are used by no one: no zeros are made for them
    ctx.save_for_backward(x, temb, weight, bias, *output[1:])


def _backward(ctx, dy, dmean, drstd, dcentre):
    x, temb, *rest = ctx.saved_tensors  # unpacked once: gradient checkpointing allows no more
    dy = torch.zeros_like(x) if dy is None else dy
    weight_grads = any(ctx.needs_input_grad[2:4])
    dx, dtemb, dweight, dbias = _group_norm_silu_backward(dy, x, temb, *rest, ctx.silu, weight_grads)
    dtemb = None if temb is None else dtemb
    return (dx, dtemb, *((dweight, dbias) if weight_grads else (None, None)), None, None, None)


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
    assert x.is_floating_point() and x.ndim == 4 and x.numel() > 0, (
        f"x must be [N, C, H, W]: {x.dtype} {tuple(x.shape)}"
    )
    assert x.shape[1] % groups == 0, f"{groups} groups do not divide {x.shape[1]} channels"
    assert weight.shape == bias.shape == x.shape[1:2], (
        f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [C]"
    )
    assert temb is None or temb.shape == x.shape[:2], f"temb {tuple(temb.shape)} must be {tuple(x.shape[:2])}"
    return _group_norm_silu(x, temb, weight, bias, groups, eps, silu)[0]


def _specimens(dtype: str, weight: str, P: int, C: int, G: int, temb: bool, silu: bool) -> list[Specimen]:
    """All kernels of one forward and backward: full-size tensors in `dtype`, parameters in `weight`, everything else
    fp32.
    """
    tile, runs, combine = _blocks(P, C, TILE), _blocks(P, C, TILE_STATISTICS), _combine_blocks(C, G)
    sums = _blocks(P, C, TILE_GRADIENTS)
    kinds = dict.fromkeys(FULL_SIZE, f"*{dtype}")
    kinds |= {"weight_ptr": f"*{weight}", "bias_ptr": f"*{weight}", "eps": "fp32"}
    kinds |= dict.fromkeys(("P", "R", "run_pixels"), "i32")
    values = {"C": C, "G": G, "HAS_TEMB": temb, "SILU": silu, "RUN_P": runs["BLOCK_P"]} | tile | combine
    specimens = []
    for kernel, blocks, warps, loads, stores in (
        (channel_statistics_kernel, runs, WARPS, True, False),
        (group_statistics_kernel, {}, 4, False, False),
        (group_norm_forward_kernel, tile, WARPS, True, True),
        (channel_gradients_kernel, sums, WARPS // 2, True, False),
        (group_gradients_kernel, {}, 4, False, False),
        (group_norm_backward_kernel, tile, WARPS, True, True),
    ):
        constants = {p: v for p, v in (values | blocks).items() if p in kernel.arg_names}
        signature = {p: kinds.get(p, "*fp32") for p in kernel.arg_names if p not in constants}
        name = f"{kernel.__name__.removesuffix('_kernel')}_{P}x{C}"
        specimens.append(
            Specimen(name, kernel, dtype, signature, constants, warps, vector_load=loads, vector_store=stores)
        )
    return specimens


AOT_SPECIMENS = [
    *_specimens("bf16", "fp32", 4096, 320, 32, temb=True, silu=True),
    *_specimens("fp16", "fp32", 4096, 320, 32, temb=True, silu=True),
    *_specimens("fp32", "fp32", 4096, 320, 32, temb=True, silu=True),
    *_specimens("bf16", "bf16", 64, 1280, 32, temb=False, silu=False),
]

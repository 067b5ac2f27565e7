"""LayerNorm over the last dimension, alone or fused with the residual add that precedes it.

    s = x + residual (rounded to the dtype, as eager does),   y = (s - mean) rstd * weight + bias,   rstd = 1 / sqrt(var + eps)

Source: Ba, Kiros, Hinton, "Layer Normalization" (arXiv 1607.06450). One read of x and residual, one write of s and y;
mean and rstd [M] in fp32 are kept for the backward, which recomputes the normalised values from s. Legend: M rows, C
channels, P programs.
"""

import torch

from csrc_triton.language import tl, triton
from csrc_triton.op import op
from csrc_triton.runtime import PINNED, on_its_device, registers, runs_triton, wide
from csrc_triton.specimen import Specimen

TILE = 2048  # elements per step of a program: one row when C > 1024, else several
WARPS = 4
MAX_CHANNELS = 4096  # a row stays in registers
MAX_PROGRAMS = 1024  # of the backward: partial sums of dweight and dbias are [P, 2, C]
REGISTERS = 64  # of the forward: left to itself triton 3.6's compiler aims at 32 for sm_80, and spills a few
ROWS_PER_PROGRAM = 32  # at least, so that the partial sums cost little beside the rows


@triton.jit
def add_residual(x, residual_ptr, sum_ptr, offsets, mask):
    """x + residual as whatever reads the sum will see it: rounded to its dtype, stored, and back in fp32. x: a fp32
    tile.
    """
    rounded = (x + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + offsets, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C], read when HAS_RESIDUAL
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    sum_ptr,  # [M, C], written when HAS_RESIDUAL
    y_ptr,  # [M, C]
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    M,
    eps,
    C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Two passes in registers: the mean, corrected by the mean of what is left (a row with a large offset rounds its
    sum coarsely), then the mean of squared deviations. Nothing is the difference of two large sums.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    mask = (row < M)[:, None] & (col < C)[None, :]
    offsets = row[:, None] * C + col[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x = add_residual(x, residual_ptr, sum_ptr, offsets, mask)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    left = tl.sum(centred, axis=1) / C
    centred = tl.where(mask, centred - left[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=1) / C + eps))
    weight = tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, centred * rstd[:, None] * weight[None, :] + bias[None, :], mask=mask)
    tl.store(mean_ptr + row, mean + left, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr,  # [M, C]
    dsum_ptr,  # [M, C], read when HAS_DSUM: gradient that reaches s beside the normalisation
    s_ptr,  # [M, C]: what was normalised
    weight_ptr,  # [C]
    mean_ptr,  # [M] fp32
    rstd_ptr,  # [M] fp32
    dx_ptr,  # [M, C]: the gradient of s, hence of x and of residual
    partial_ptr,  # [P, 2, C] fp32, written when WEIGHT_GRADS: this program's dweight and dbias
    M,
    rows_per_program,  # a multiple of ROWS
    C: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    WEIGHT_GRADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With n = (s - mean) rstd and g = dy * weight, for each row

        ds = rstd (g - mean_c(g) - n mean_c(g n)) + dsum,      dweight = sum over rows of dy n,      dbias = sum over rows of dy

    since d mean / ds_i = 1/C and d rstd / ds_i = -rstd^2 n_i / C: the two subtracted means are what the statistics pass
    back. Each program owns consecutive rows and sums its share of dweight and dbias in registers, in row order.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_per_program
    col = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & (col < C)[None, :]
        offsets = row[:, None] * C + col[None, :]
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        centred = tl.where(mask, s - mean[:, None], 0.0)
        left = tl.sum(centred, axis=1) / C  # a large mean is off by its own rounding: as in the forward
        normal = tl.fma(centred, rstd[:, None], -(left * rstd)[:, None])
        g = dy * weight[None, :]  # zero where masked, so that normal need not be
        mean_g = tl.sum(g, axis=1) / C
        mean_gn = tl.sum(g * normal, axis=1) / C
        ds = tl.fma(g, rstd[:, None], tl.fma(normal, -(mean_gn * rstd)[:, None], -(mean_g * rstd)[:, None]))
        if HAS_DSUM:
            ds += tl.load(dsum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, ds, mask=mask)
        if WEIGHT_GRADS:
            dweight = tl.fma(dy, normal, dweight)
            dbias += dy
    if WEIGHT_GRADS:
        partial = partial_ptr + program.to(tl.int64) * (2 * C) + col
        tl.store(partial, tl.sum(dweight, axis=0), mask=col < C)
        tl.store(partial + C, tl.sum(dbias, axis=0), mask=col < C)


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # [P, 2, C] fp32
    first_ptr,  # [C], any floating dtype
    second_ptr,  # [C], the same dtype
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Second stage of a pair of column sums, in a fixed order: partials are added in steps of BLOCK_P, then across the
    step.
    """
    which = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        mask = (row < P)[:, None] & (col < C)[None, :]
        total += tl.load(partial_ptr + (row[:, None].to(tl.int64) * 2 + which) * C + col[None, :], mask=mask, other=0.0)
    column_sum = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first_ptr + col, column_sum, mask=col < C)
    else:
        tl.store(second_ptr + col, column_sum, mask=col < C)


@on_its_device
def sum_partials(partial: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial` [P, 2, C] fp32 summed over P, always in the same order: two tensors [C] in the dtype of `like`."""
    P, two, C = partial.shape
    assert two == 2 and partial.is_contiguous() and partial.dtype == torch.float32, (
        f"{partial.dtype} {tuple(partial.shape)}"
    )
    first, second = like.new_empty(C), like.new_empty(C)
    sum_partials_kernel[(triton.cdiv(C, 32), 2)](
        partial, first, second, P, C, BLOCK_P=64, BLOCK_C=32, num_warps=WARPS, **PINNED
    )
    return first, second


def _blocks(C: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(C)
    return {"ROWS": max(1, TILE // block_c), "BLOCK_C": block_c}


def _programs(M: int, rows: int) -> tuple[int, int]:
    """(programs, rows per program) of the backward: a function of the shape alone, so that sums do not depend on the
    device.
    """
    per_program = triton.cdiv(M, min(triton.cdiv(M, ROWS_PER_PROGRAM), MAX_PROGRAMS))
    per_program = triton.cdiv(per_program, rows) * rows
    return triton.cdiv(M, per_program), per_program


@on_its_device
def _launch_forward(x, residual, weight, bias, eps):
    """(s or None, y, mean, rstd) for contiguous x [..., C] and an optional residual of the same shape."""
    C = x.shape[-1]
    M = x.numel() // C
    y, s = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    mean, rstd = x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.float32)
    blocks = _blocks(C)
    layer_norm_forward_kernel[(triton.cdiv(M, blocks["ROWS"]),)](
        x, x if residual is None else residual, weight, bias, y if s is None else s, y, mean, rstd, M, eps,
        C=C, HAS_RESIDUAL=residual is not None, **blocks, num_warps=WARPS, **PINNED, **registers(REGISTERS),
    )  # fmt: skip
    return s, y, mean, rstd


@on_its_device
def _launch_backward(dy, dsum, s, weight, mean, rstd, weight_grads):
    """(dx, dweight, dbias); the latter two are empty tensors unless `weight_grads`."""
    C = s.shape[-1]
    M = s.numel() // C
    dx = torch.empty_like(s)
    blocks = _blocks(C)
    programs, per_program = _programs(M, blocks["ROWS"])
    partial = s.new_empty((programs if weight_grads else 0, 2, C), dtype=torch.float32)
    layer_norm_backward_kernel[(programs,)](
        dy, dy if dsum is None else dsum, s, weight, mean, rstd, dx, partial, M, per_program,
        C=C, HAS_DSUM=dsum is not None, WEIGHT_GRADS=weight_grads, **blocks, num_warps=WARPS, **PINNED,
    )  # fmt: skip
    return dx, *(sum_partials(partial, weight) if weight_grads else (weight.new_empty(0), weight.new_empty(0)))


def layer_norm_reference(x, residual, weight, bias, eps):
    """Plain torch form of the forward: (s or None, y, mean, rstd), arithmetic in at least float32."""
    s = None if residual is None else x + residual
    wide_s = wide(x if s is None else s)
    var, mean = torch.var_mean(wide_s, dim=-1, correction=0)
    rstd = torch.rsqrt(var + eps)
    y = (wide_s - mean[..., None]) * rstd[..., None] * wide(weight) + wide(bias)
    return s, y.to(x.dtype), mean, rstd


def layer_norm_backward_reference(dy, dsum, s, weight, mean, rstd, weight_grads):
    """Plain torch form of the backward: (dx, dweight, dbias)."""
    normal = (wide(s) - mean[..., None]) * rstd[..., None]
    wide_dy = wide(dy)
    g = wide_dy * wide(weight)
    dx = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * rstd[..., None]
    dx = (dx if dsum is None else dx + wide(dsum)).to(s.dtype)
    if not weight_grads:
        return dx, weight.new_empty(0), weight.new_empty(0)
    return dx, (wide_dy * normal).flatten(0, -2).sum(0).to(weight.dtype), wide_dy.flatten(0, -2).sum(0).to(weight.dtype)


def _forward(x, residual, weight, bias, eps):
    launch = runs_triton(x) and x.shape[-1] <= MAX_CHANNELS
    return (_launch_forward if launch else layer_norm_reference)(
        x, residual, weight.contiguous(), bias.contiguous(), eps
    )


@op("layer_norm")
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x.contiguous(), None, weight, bias, eps)[1:]


@op("add_layer_norm")
def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x.contiguous(), residual.contiguous(), weight, bias, eps)


@op("layer_norm_backward")
def _layer_norm_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    launch = runs_triton(s) and s.shape[-1] <= MAX_CHANNELS
    dsum = None if dsum is None else dsum.contiguous()
    return (_launch_backward if launch else layer_norm_backward_reference)(
        dy.contiguous(), dsum, s.contiguous(), weight.contiguous(), mean, rstd, weight_grads
    )


def _statistics(x):
    return [x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), *_statistics(x)


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_statistics(x)


@_layer_norm_backward.register_fake
def _(dy, dsum, s, weight, mean, rstd, weight_grads):
    shape = weight.shape if weight_grads else (0,)
    return s.new_empty(s.shape), weight.new_empty(shape), weight.new_empty(shape)


def _setup_layer_norm(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *output[1:])


def _setup_add_layer_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    s, _, mean, rstd = output
    ctx.save_for_backward(s, inputs[2], mean, rstd)


def _gradients(ctx, dy, dsum, weight_grads):
    s, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy
    dx, dweight, dbias = _layer_norm_backward(dy, dsum, s, weight, mean, rstd, weight_grads)
    return (dx, dweight, dbias) if weight_grads else (dx, None, None)


def _backward_layer_norm(ctx, dy, dmean, drstd):
    dx, dweight, dbias = _gradients(ctx, dy, None, any(ctx.needs_input_grad[1:3]))
    return dx, dweight, dbias, None


def _backward_add_layer_norm(ctx, dsum, dy, dmean, drstd):
    dx, dweight, dbias = _gradients(ctx, dy, dsum, any(ctx.needs_input_grad[2:4]))
    return dx, dx, dweight, dbias, None


_layer_norm.register_autograd(_backward_layer_norm, setup_context=_setup_layer_norm)
_add_layer_norm.register_autograd(_backward_add_layer_norm, setup_context=_setup_add_layer_norm)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    assert x.is_floating_point() and x.ndim >= 2, (
        f"layer_norm needs a floating tensor [..., C], got {x.dtype} {tuple(x.shape)}"
    )
    assert x.numel() > 0 and weight.shape == bias.shape == x.shape[-1:], (
        f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [C], x {tuple(x.shape)} not empty"
    )


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Normalised `x` [..., C] in its dtype, contiguous. weight and bias: [C], any floating dtype; statistics in fp32."""
    _check(x, weight, bias)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, its normalised form), both [..., C] contiguous in the dtype of x and residual, which must agree."""
    _check(x, weight, bias)
    assert x.shape == residual.shape and x.dtype == residual.dtype, (
        f"x {x.dtype} {tuple(x.shape)} and residual {residual.dtype} {tuple(residual.shape)} must agree"
    )
    return _add_layer_norm(x, residual, weight, bias, eps)[:2]


def _specimen(kernel, dtype: str, weight: str, C: int, residual: bool) -> Specimen:
    """Rows in `dtype`, parameters in `weight`, statistics and partial sums fp32."""
    kinds = {"weight_ptr": f"*{weight}", "bias_ptr": f"*{weight}", "M": "i32", "rows_per_program": "i32", "eps": "fp32"}
    kinds |= dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32")
    values = {"C": C, "HAS_RESIDUAL": residual, "HAS_DSUM": residual, "WEIGHT_GRADS": True} | _blocks(C)
    constants = {p: v for p, v in values.items() if p in kernel.arg_names}
    signature = {p: kinds.get(p, f"*{dtype}") for p in kernel.arg_names if p not in constants}
    name = f"{kernel.__name__.removesuffix('_kernel')}_{C}{'_add' if residual else ''}"
    limit = REGISTERS if kernel is layer_norm_forward_kernel else None
    return Specimen(name, kernel, dtype, signature, constants, WARPS, maxnreg=limit)


AOT_SPECIMENS = [
    _specimen(kernel, dtype, weight, C, residual)
    for kernel in (layer_norm_forward_kernel, layer_norm_backward_kernel)
    for dtype, weight, C, residual in (
        ("bf16", "fp32", 1280, True), ("bf16", "bf16", 640, False), ("fp16", "fp32", 320, True), ("fp32", "fp32", 1280, True)
    )
] + [
    Specimen(
        "sum_partials", sum_partials_kernel, dtype,
        {"partial_ptr": "*fp32", "first_ptr": f"*{dtype}", "second_ptr": f"*{dtype}", "P": "i32", "C": "i32"},
        {"BLOCK_P": 64, "BLOCK_C": 32}, WARPS, aligned=("partial_ptr", "first_ptr", "second_ptr", "C"), vector_store=False,
    )
    for dtype in ("fp32", "bf16")
]  # fmt: skip

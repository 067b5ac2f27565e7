"""GEGLU with the exact (erf) GELU, read straight out of the projection.

    out = h * gelu(gate),    h, gate = proj[..., :D], proj[..., D:],    gelu(g) = g Phi(g),    Phi(g) = (1 + erf(g / sqrt 2)) / 2

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202); the feed-forward activation of Stable
Diffusion's transformer blocks. The two halves are never copied apart and only the projection is kept for the backward:
eager PyTorch also keeps gelu(gate).
"""

import math

import torch
import torch.nn.functional as F

from csrc_triton.language import tl, triton
from csrc_triton.op import op
from csrc_triton.runtime import PINNED, on_its_device, runs_triton, wide
from csrc_triton.specimen import Specimen

TILE = (
    2048  # elements of the output per program: two 16-byte vectors of a half dtype per thread and operand, four warps
)
WARPS = 4


@triton.jit
def _tile_offsets(M, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [BLOCK_M, 1] in int64 (a projection can pass 2**31 elements), columns [1, BLOCK_D] and mask of this
    program's tile.
    """
    tiles_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    rows = (pid // tiles_d).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = (pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return rows, cols, (rows < M) & (cols < D)


@triton.jit
def geglu_forward_kernel(
    proj_ptr,  # [M, 2 * D]: h, then gate
    out_ptr,  # [M, D]
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, cols, mask = _tile_offsets(M, D, BLOCK_M, BLOCK_D)
    h = tl.load(proj_ptr + rows * (2 * D) + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(proj_ptr + rows * (2 * D) + D + cols, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + rows * D + cols, h * (gate * cdf), mask=mask)


@triton.jit
def geglu_backward_kernel(
    grad_ptr,  # [M, D]
    proj_ptr,  # [M, 2 * D]: h, then gate
    d_proj_ptr,  # [M, 2 * D]
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With o = h * g * Phi(g) and phi the standard normal density, phi = Phi':

        do/dh = g Phi(g)          do/dg = h (Phi(g) + g phi(g)),          phi(g) = exp(-g^2 / 2) / sqrt(2 pi)

    Phi is recomputed from the projection: one erf and one exp are cheaper than reading a saved activation back.
    """
    rows, cols, mask = _tile_offsets(M, D, BLOCK_M, BLOCK_D)
    grad = tl.load(grad_ptr + rows * D + cols, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(proj_ptr + rows * (2 * D) + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(proj_ptr + rows * (2 * D) + D + cols, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(d_proj_ptr + rows * (2 * D) + cols, grad * (gate * cdf), mask=mask)
    tl.store(d_proj_ptr + rows * (2 * D) + D + cols, grad * (h * (cdf + gate * pdf)), mask=mask)


def _blocks(D: int) -> dict[str, int]:
    """Tile of the output: up to 256 columns (SD1.x and SDXL have 1280, 2560 or 5120, all multiples), the rest rows."""
    block_d = min(256, triton.next_power_of_2(D))
    return {"BLOCK_M": TILE // block_d, "BLOCK_D": block_d}


def _grid(M: int, D: int) -> tuple[int]:
    blocks = _blocks(D)
    return (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(D, blocks["BLOCK_D"]),)


@on_its_device
def _launch_forward(proj: torch.Tensor) -> torch.Tensor:
    D = proj.shape[-1] // 2
    out = proj.new_empty(*proj.shape[:-1], D)
    M = out.numel() // D
    geglu_forward_kernel[_grid(M, D)](proj, out, M, D=D, **_blocks(D), num_warps=WARPS, **PINNED)
    return out


@on_its_device
def _launch_backward(grad: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    D = grad.shape[-1]
    d_proj = torch.empty_like(proj)
    M = grad.numel() // D
    geglu_backward_kernel[_grid(M, D)](grad, proj, d_proj, M, D=D, **_blocks(D), num_warps=WARPS, **PINNED)
    return d_proj


def geglu_reference(proj: torch.Tensor) -> torch.Tensor:
    """Plain torch, [..., 2D] -> [..., D], in at least float32."""
    h, gate = wide(proj).chunk(2, dim=-1)
    return (h * F.gelu(gate)).to(proj.dtype)


def geglu_backward_reference(grad: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    """Plain torch form of `geglu_backward_kernel`: grad [..., D], proj [..., 2D] -> [..., 2D]."""
    h, gate = wide(proj).chunk(2, dim=-1)
    cdf = 0.5 * (1.0 + torch.erf(gate * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * gate * gate) / math.sqrt(2.0 * math.pi)
    return torch.cat([wide(grad) * (gate * cdf), wide(grad) * (h * (cdf + gate * pdf))], dim=-1).to(proj.dtype)


@op("geglu")
def _geglu(proj: torch.Tensor) -> torch.Tensor:
    proj = proj.contiguous()
    return _launch_forward(proj) if runs_triton(proj) else geglu_reference(proj)


@op("geglu_backward")
def _geglu_backward(grad: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    grad, proj = grad.contiguous(), proj.contiguous()
    return _launch_backward(grad, proj) if runs_triton(proj) else geglu_backward_reference(grad, proj)


@_geglu.register_fake
def _(proj):
    return proj.new_empty(*proj.shape[:-1], proj.shape[-1] // 2)


@_geglu_backward.register_fake
def _(grad, proj):
    return proj.new_empty(proj.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _geglu_backward(grad, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=_setup_context)


def geglu(proj: torch.Tensor) -> torch.Tensor:
    """h * gelu(gate) for the two halves of `proj`'s last dimension.

    Args:
        proj: [..., 2D], float32, bfloat16 or float16 (float64 takes the torch path). Saved for the backward.
    Returns:
        [..., D], contiguous, in the dtype of `proj`.
    """
    assert proj.numel() > 0 and proj.shape[-1] % 2 == 0, f"geglu needs [..., 2D], not empty, got {tuple(proj.shape)}"
    assert proj.is_floating_point(), f"geglu needs a floating dtype, got {proj.dtype}"
    return _geglu(proj)


AOT_SPECIMENS = [
    Specimen(name, kernel, dtype, dict.fromkeys(pointers, f"*{dtype}") | {"M": "i32"}, {"D": D} | _blocks(D), WARPS)
    for name, kernel, pointers in (
        ("geglu_forward", geglu_forward_kernel, ("proj_ptr", "out_ptr")),
        ("geglu_backward", geglu_backward_kernel, ("grad_ptr", "proj_ptr", "d_proj_ptr")),
    )
    for dtype in ("bf16", "fp16", "fp32")
    for D in (1280,)
]

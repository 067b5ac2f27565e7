"""The timestep of each pair, drawn uniformly from a list of them: one launch, with the bits of `philox.integers`.

    t = values[floor(word K / 2^32)],    word: element 0 of stream TIMESTEP of (pair key, draw, seed)

In plain torch the ten rounds of Philox are some 280 operations on B numbers each.
"""

import torch

from csrc_triton.language import HAS_TRITON, tl, triton
from csrc_triton.op import op
from csrc_triton.philox import Stream, integers, random_words, seed_tensor
from csrc_triton.runtime import PINNED, on_its_device
from csrc_triton.specimen import Specimen

BLOCK = 128  # pairs of a program
TIMESTEP = tl.constexpr(int(Stream.TIMESTEP))


@triton.jit
def draw_timesteps_kernel(
    values_ptr,  # [K] int64
    keys_ptr,  # [B] int64
    draws_ptr,  # [B] int64
    seed_ptr,  # [] int64
    out_ptr,  # [B] int64
    B,
    K,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < B
    key = tl.load(keys_ptr + pair, mask=inside, other=0)
    draw = tl.load(draws_ptr + pair, mask=inside, other=0)
    word, _, _, _ = random_words(pair * 0, key, draw, tl.load(seed_ptr), TIMESTEP)
    place = ((word.to(tl.uint64) * K) >> 32).to(tl.int64)
    tl.store(out_ptr + pair, tl.load(values_ptr + place, mask=inside, other=0), mask=inside)


def runs_triton(x: torch.Tensor) -> bool:
    """As `runtime.runs_triton`, for tensors of whole numbers."""
    return HAS_TRITON and x.is_cuda


@on_its_device
def _launch(values: torch.Tensor, keys: torch.Tensor, draws: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(keys)
    draw_timesteps_kernel[(triton.cdiv(keys.numel(), BLOCK),)](
        values, keys.contiguous(), draws.contiguous(), seed, out, keys.numel(), values.numel(),
        BLOCK=BLOCK, num_warps=4, **PINNED,
    )  # fmt: skip
    return out


def draw_timesteps_reference(
    values: torch.Tensor, keys: torch.Tensor, draws: torch.Tensor, seed: torch.Tensor
) -> torch.Tensor:
    """Plain torch form of `draw_timesteps`, for any device; same arguments, same result."""
    return values[integers(keys, draws, Stream.TIMESTEP, seed, 0, values.numel())]


@op("draw_timesteps")
def _draw(values: torch.Tensor, keys: torch.Tensor, draws: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    return (_launch if runs_triton(values) else draw_timesteps_reference)(values, keys, draws, seed)


@_draw.register_fake
def _(values, keys, draws, seed):
    return torch.empty_like(keys)


def draw_timesteps(
    values: torch.Tensor, keys: torch.Tensor, draws: torch.Tensor, seed: torch.Tensor | int
) -> torch.Tensor:
    """[B] int64: for each pair one of `values` [K] int64, all as likely; K below 2^31.

    keys, draws [B] int64; seed an int64 0-d tensor on their device, or an int (which a CUDA graph freezes).
    """
    assert values.ndim == 1 and 0 < values.numel() < 2**31 and values.dtype == torch.int64, (
        f"values must be int64 [K], got {values.dtype} {tuple(values.shape)}"
    )
    assert keys.ndim == 1 and keys.shape == draws.shape and keys.dtype == draws.dtype == torch.int64, (
        f"keys {keys.dtype} {tuple(keys.shape)} and draws {draws.dtype} {tuple(draws.shape)} must be int64 [B]"
    )
    return _draw(values.contiguous(), keys, draws, seed_tensor(seed, keys.device))


AOT_SPECIMENS = [
    Specimen(
        "draw_timesteps", draw_timesteps_kernel, "i64",
        {f"{name}_ptr": "*i64" for name in ("values", "keys", "draws", "seed", "out")} | {"B": "i32", "K": "i32"},
        {"BLOCK": BLOCK}, 4, vector_load=False, vector_store=False,
    )
]  # fmt: skip

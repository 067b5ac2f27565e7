"""Noisy latents of both halves of every pair from one keyed noise draw that is never stored, and the keyed VAE
posterior sample.

    x_t = signal(t) x_0 + spread(t) eps            Ho et al. 2020 (DDPM), eq. 4: sqrt(abar_t) and sqrt(1 - abar_t)
    z   = (mean + std n - shift) scale             posterior sample of the VAE in the model's units, by channel

The win and the lose half of a pair share t and eps (Wallace et al. 2024, eq. 14), so the noise is generated once per
pair, in registers. Batches hold the wins, then the losers: [2B, C, H, W]. Arithmetic in fp32 (float64 for float64
latents, plain torch only).
"""

from dataclasses import replace

import torch

from csrc_triton.language import tl, triton
from csrc_triton.latents import addressable, element_offsets, empty_like
from csrc_triton.op import op
from csrc_triton.philox import Stream, normal, normal_span, seed_tensor
from csrc_triton.runtime import PINNED, on_its_device, runs_triton, wide
from csrc_triton.specimen import Specimen

BLOCK = 1024  # elements of one sample per program: one 16-byte vector of a half dtype per thread
WARPS = 4
VAE_WIN, VAE_LOSE, NOISE = (
    tl.constexpr(int(Stream.VAE_WIN)),
    tl.constexpr(int(Stream.VAE_LOSE)),
    tl.constexpr(int(Stream.NOISE)),
)


@triton.jit
def noise_pairs_kernel(
    latents_ptr,  # [2B, C, H, W]
    timesteps_ptr,  # [B] int64
    signal_ptr,  # [T] fp32
    spread_ptr,  # [T] fp32
    keys_ptr,  # [B] int64
    draws_ptr,  # [B] int64
    seed_ptr,  # [] int64
    noisy_ptr,  # [2B, C, H, W], in the memory format of the latents
    batch,  # B
    channels,
    pixels,  # H W
    elements,  # C H W
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, pair = tl.program_id(0) * BLOCK, tl.program_id(1)
    timestep = tl.load(timesteps_ptr + pair)
    signal, spread = tl.load(signal_ptr + timestep), tl.load(spread_ptr + timestep)
    noise = normal_span(
        first // 4, tl.load(keys_ptr + pair), tl.load(draws_ptr + pair), tl.load(seed_ptr), NOISE, BLOCK
    )
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    offset = element_offsets(element, channels, pixels, CHANNELS_LAST)
    for half in tl.static_range(2):
        start = (pair + half * batch).to(tl.int64) * elements
        clean = tl.load(latents_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(noisy_ptr + start + offset, signal * clean + spread * noise, mask=mask)


@triton.jit
def sample_posterior_kernel(
    mean_ptr,  # [2B, C, H, W]
    std_ptr,  # [2B, C, H, W]
    keys_ptr,  # [B] int64
    draws_ptr,  # [B] int64
    seed_ptr,  # [] int64
    out_ptr,  # [2B, C, H, W], in the memory format of the mean
    batch,  # B
    channels,
    pixels,  # H W
    elements,  # C H W
    scale_ptr,  # [C] fp32
    shift_ptr,  # [C] fp32
    MEAN_LAST: tl.constexpr,
    STD_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, sample = tl.program_id(0) * BLOCK, tl.program_id(1)
    pair = sample % batch
    stream = tl.where(sample < batch, VAE_WIN, VAE_LOSE)
    noise = normal_span(
        first // 4, tl.load(keys_ptr + pair), tl.load(draws_ptr + pair), tl.load(seed_ptr), stream, BLOCK
    )
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    start = sample.to(tl.int64) * elements
    mean_offset = start + element_offsets(element, channels, pixels, MEAN_LAST)
    mean = tl.load(mean_ptr + mean_offset, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + start + element_offsets(element, channels, pixels, STD_LAST), mask=mask, other=0.0).to(
        tl.float32
    )
    channel = element // pixels
    scale = tl.load(scale_ptr + channel, mask=mask, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=mask, other=0.0)
    tl.store(out_ptr + mean_offset, (mean + std * noise - shift) * scale, mask=mask)


# -------------------------------------------------------------------------------------------------------------------- launchers


@on_its_device
def _launch_noise(latents, timesteps, signal, spread, keys, draws, seed, out_dtype) -> torch.Tensor:
    latents, channels_last = addressable(latents)
    samples, channels, height, width = latents.shape
    elements = channels * height * width
    noisy = empty_like(latents, out_dtype)
    noise_pairs_kernel[(triton.cdiv(elements, BLOCK), samples // 2)](
        latents, timesteps, signal, spread, keys, draws, seed, noisy,
        samples // 2, channels, height * width, elements,
        CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=WARPS, **PINNED,
    )  # fmt: skip
    return noisy


@on_its_device
def _launch_posterior(mean, std, keys, draws, seed, scale, shift) -> torch.Tensor:
    (mean, mean_last), (std, std_last) = addressable(mean), addressable(std)
    samples, channels, height, width = mean.shape
    elements = channels * height * width
    out = empty_like(mean, mean.dtype)
    sample_posterior_kernel[(triton.cdiv(elements, BLOCK), samples)](
        mean, std, keys, draws, seed, out,
        samples // 2, channels, height * width, elements, scale, shift,
        MEAN_LAST=mean_last, STD_LAST=std_last, BLOCK=BLOCK, num_warps=WARPS, **PINNED,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------------------ plain torch


def noise_pairs_reference(
    latents, timesteps, signal, spread, keys, draws, seed, *, out_dtype: torch.dtype | None = None
):
    """Plain torch form of `noise_pairs`, for any device; same arguments, same result."""
    _check(latents, timesteps, signal, spread, keys, draws)
    clean = wide(latents)
    noise = pair_noise(keys, draws, seed, tuple(latents.shape[1:]), clean.dtype).repeat(2, 1, 1, 1)
    of_data, of_noise = (table.to(clean.dtype)[timesteps].repeat(2).view(-1, 1, 1, 1) for table in (signal, spread))
    return empty_like(latents, out_dtype or latents.dtype).copy_(of_data * clean + of_noise * noise)


def sample_posterior_reference(
    mean, std, keys, draws, seed, scale: torch.Tensor | float, shift: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Plain torch form of `sample_posterior`, for any device; same arguments, same result."""
    shape, dtype = tuple(mean.shape[1:]), wide(mean).dtype
    scale, shift = (by_channel(value, mean).view(-1, 1, 1) for value in (scale, shift))
    noise = torch.cat([normal(keys, draws, stream, seed, shape, dtype) for stream in (Stream.VAE_WIN, Stream.VAE_LOSE)])
    return empty_like(mean, mean.dtype).copy_((wide(mean) + wide(std) * noise - shift) * scale)


def pair_noise(keys, draws, seed, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise [B, *shape] that `noise_pairs` adds to both halves: keys [B], draws [B] int64."""
    return normal(keys, draws, Stream.NOISE, seed, shape, dtype)


# ------------------------------------------------------------------------------------------------------------------------- ops


@op("noise_pairs")
def _noise_pairs(
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    signal: torch.Tensor,
    spread: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if runs_triton(latents):
        return _launch_noise(latents, timesteps, signal, spread, keys, draws, seed, out_dtype)
    return noise_pairs_reference(latents, timesteps, signal, spread, keys, draws, seed, out_dtype=out_dtype)


@_noise_pairs.register_fake
def _(latents, timesteps, signal, spread, keys, draws, seed, out_dtype):
    return empty_like(latents, out_dtype)


@op("sample_posterior")
def _sample_posterior(
    mean: torch.Tensor,
    std: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    if runs_triton(mean):
        return _launch_posterior(mean, std, keys, draws, seed, scale, shift)
    return sample_posterior_reference(mean, std, keys, draws, seed, scale, shift)


@_sample_posterior.register_fake
def _(mean, std, keys, draws, seed, scale, shift):
    return empty_like(mean, mean.dtype)


# --------------------------------------------------------------------------------------------------------------- public functions


def _check(latents, timesteps, signal, spread, keys, draws) -> None:
    assert latents.ndim == 4 and latents.shape[0] % 2 == 0, f"latents must be [2B, C, H, W], got {tuple(latents.shape)}"
    batch = latents.shape[0] // 2
    for name, value in (("timesteps", timesteps), ("keys", keys), ("draws", draws)):
        assert value.shape == (batch,) and value.dtype == torch.int64, (
            f"{name} must be int64 [{batch}], got {value.dtype} {tuple(value.shape)}"
        )
    assert signal.ndim == 1 and signal.shape == spread.shape, (
        f"signal and spread must both be [T], got {tuple(signal.shape)}, {tuple(spread.shape)}"
    )


def noise_pairs(
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    signal: torch.Tensor,
    spread: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor | int,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x_t [2B, C, H, W] of wins, then losers; win and lose of a pair share timestep and noise.

    latents [2B, C, H, W]; timesteps, keys, draws int64 [B]; signal, spread [T]: x_t = signal(t) x_0 + spread(t) eps;
    seed an int64 0-d tensor on the device (an int is frozen inside a CUDA graph). Result in `out_dtype` (default: that
    of the latents) and the memory format of the latents. Not differentiable. Timesteps outside [0, T) are an error that
    only the CPU reports.
    """
    _check(latents, timesteps, signal, spread, keys, draws)
    dtype = wide(latents).dtype
    tables = (signal.to(dtype).contiguous(), spread.to(dtype).contiguous())
    return _noise_pairs(
        latents, timesteps, *tables, keys, draws, seed_tensor(seed, latents.device), out_dtype or latents.dtype
    )


def sample_posterior(
    mean: torch.Tensor,
    std: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor | int,
    scale: torch.Tensor | float,
    shift: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """(mean + std n - shift) scale, [2B, C, H, W] in the mean's dtype and memory format; wins and losers have own
    streams.

    mean, std [2B, C, H, W] of one dtype; keys, draws int64 [B]; seed an int64 0-d tensor on the device or an int; scale,
    shift: one number, or one for each channel [C], on the device.
    """
    assert mean.ndim == 4 and mean.shape[0] % 2 == 0, f"mean must be [2B, C, H, W], got {tuple(mean.shape)}"
    assert std.shape == mean.shape and std.dtype == mean.dtype, f"std {std.dtype} {tuple(std.shape)} must be like mean"
    assert keys.shape == draws.shape == (mean.shape[0] // 2,), (
        f"keys {tuple(keys.shape)} and draws {tuple(draws.shape)} must be [B]"
    )
    scale, shift = by_channel(scale, mean), by_channel(shift, mean)
    return _sample_posterior(mean, std, keys, draws, seed_tensor(seed, mean.device), scale, shift)


def by_channel(value: torch.Tensor | float, latents: torch.Tensor) -> torch.Tensor:
    """A number, or one for each channel, as [C] in fp32 (float64 for float64 latents [N, C, H, W])."""
    channels, dtype = latents.shape[1], wide(latents[:0]).dtype
    if not isinstance(value, torch.Tensor):
        return torch.full((channels,), value, dtype=dtype, device=latents.device)
    assert value.shape == (channels,), f"a number for each of {channels} channels, got {tuple(value.shape)}"
    return value.to(dtype).contiguous()


_INTEGERS = {"batch": "i32", "channels": "i32", "pixels": "i32", "elements": "i32"}
_TABLES = {"timesteps_ptr": "*i64", "signal_ptr": "*fp32", "spread_ptr": "*fp32"}
_KEYS = {"keys_ptr": "*i64", "draws_ptr": "*i64", "seed_ptr": "*i64"}


def _specimens() -> list[Specimen]:
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        noising = {"latents_ptr": f"*{dtype}", "noisy_ptr": f"*{dtype}", **_TABLES, **_KEYS, **_INTEGERS}
        constexprs = {"CHANNELS_LAST": False, "BLOCK": BLOCK}
        found.append(Specimen("noise_pairs", noise_pairs_kernel, dtype, noising, constexprs, WARPS))
        signature = {"mean_ptr": f"*{dtype}", "std_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **_KEYS, **_INTEGERS}
        signature |= {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}
        constexprs = {"MEAN_LAST": False, "STD_LAST": False, "BLOCK": BLOCK}
        found.append(Specimen("sample_posterior", sample_posterior_kernel, dtype, signature, constexprs, WARPS))
    return [replace(specimen, aligned=("elements", "pixels")) for specimen in found]


AOT_SPECIMENS = _specimens()

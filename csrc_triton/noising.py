"""Noisy latents of both halves of every pair from one keyed noise draw that is never stored, and the keyed VAE posterior sample.

    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                    Ho et al. 2020 (DDPM), eq. 4
    target = eps                                                        epsilon-prediction, DDPM eq. 14
    target = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0                    v-prediction, Salimans and Ho 2022, appendix D
    z      = (mean + std n - shift) scale                               posterior sample of the VAE in the model's units

The win and the lose half of a pair share t and eps (Wallace et al. 2024, eq. 14), so the noise is generated once per pair, in
registers. Batches hold the wins, then the losers: [2B, C, H, W]. Arithmetic in fp32 (float64 for float64 latents, plain torch
only).
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from csrc_triton.aot import Specimen
from csrc_triton.elementary import torch_sqrt_rn
from csrc_triton.latents import addressable, element_offsets, empty_like
from csrc_triton.philox import Stream, normal, normal_span, seed_tensor
from csrc_triton.runtime import PINNED, runs_triton, wide

BLOCK = 1024  # elements of one sample per program: one 16-byte vector of a half dtype per thread
WARPS = 4
PREDICTION_TYPES = ("epsilon", "v_prediction")
NO_TARGET, EPSILON, V_PREDICTION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
VAE_WIN, VAE_LOSE, NOISE = tl.constexpr(int(Stream.VAE_WIN)), tl.constexpr(int(Stream.VAE_LOSE)), tl.constexpr(int(Stream.NOISE))


@triton.jit
def noise_pairs_kernel(
    latents_ptr,  # [2B, C, H, W]
    timesteps_ptr,  # [B] int64
    alphas_ptr,  # [T] fp32 or fp64: abar
    keys_ptr,  # [B] int64
    draws_ptr,  # [B] int64
    seed_ptr,  # [] int64
    noisy_ptr,  # [2B, C, H, W], in the memory format of the latents
    target_ptr,  # [2B, C, H, W] fp32, likewise; None without a target
    batch,  # B
    channels,
    pixels,  # H W
    elements,  # C H W
    TARGET: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, pair = tl.program_id(0) * BLOCK, tl.program_id(1)
    abar = tl.load(alphas_ptr + tl.load(timesteps_ptr + pair))
    signal = tl.sqrt_rn(abar.to(tl.float32))
    spread = tl.sqrt_rn((1.0 - abar).to(tl.float32))
    noise = normal_span(first // 4, tl.load(keys_ptr + pair), tl.load(draws_ptr + pair), tl.load(seed_ptr), NOISE, BLOCK)
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    offset = element_offsets(element, channels, pixels, CHANNELS_LAST)
    for half in tl.static_range(2):
        start = (pair + half * batch).to(tl.int64) * elements
        clean = tl.load(latents_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(noisy_ptr + start + offset, signal * clean + spread * noise, mask=mask)
        if TARGET == EPSILON:
            tl.store(target_ptr + start + offset, noise, mask=mask)
        if TARGET == V_PREDICTION:
            tl.store(target_ptr + start + offset, signal * noise - spread * clean, mask=mask)


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
    scale,  # fp32
    shift,  # fp32
    MEAN_LAST: tl.constexpr,
    STD_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, sample = tl.program_id(0) * BLOCK, tl.program_id(1)
    pair = sample % batch
    stream = tl.where(sample < batch, VAE_WIN, VAE_LOSE)
    noise = normal_span(first // 4, tl.load(keys_ptr + pair), tl.load(draws_ptr + pair), tl.load(seed_ptr), stream, BLOCK)
    element = first + tl.arange(0, BLOCK)
    mask = element < elements
    start = sample.to(tl.int64) * elements
    mean_offset = start + element_offsets(element, channels, pixels, MEAN_LAST)
    mean = tl.load(mean_ptr + mean_offset, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + start + element_offsets(element, channels, pixels, STD_LAST), mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + mean_offset, (mean + std * noise - shift) * scale, mask=mask)


# -------------------------------------------------------------------------------------------------------------------- launchers


def _launch_noise(latents, timesteps, alphas_cumprod, keys, draws, seed, prediction_type: str | None, out_dtype):
    """(x_t, target or None); `prediction_type` None asks for no target."""
    latents, channels_last = addressable(latents)
    samples, channels, height, width = latents.shape
    elements = channels * height * width
    noisy = empty_like(latents, out_dtype)
    target = empty_like(latents, torch.float32) if prediction_type else None
    noise_pairs_kernel[(triton.cdiv(elements, BLOCK), samples // 2)](
        latents, timesteps, alphas_cumprod, keys, draws, seed, noisy, target,
        samples // 2, channels, height * width, elements,
        TARGET=1 + PREDICTION_TYPES.index(prediction_type) if prediction_type else 0,
        CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=WARPS, **PINNED,
    )  # fmt: skip
    return noisy, target


def _launch_posterior(mean, std, keys, draws, seed, scale: float, shift: float) -> torch.Tensor:
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


def signal_and_spread(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, 1, 1] in fp32 or float64. 1 - abar is formed in the table's dtype."""
    abar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if dtype == torch.float64:
        return abar.double().sqrt(), (1.0 - abar.double()).sqrt()
    return torch_sqrt_rn(abar.float()), torch_sqrt_rn((1.0 - abar).float())


def noise_and_target_reference(
    latents, timesteps, alphas_cumprod, keys, draws, seed, *, prediction_type: str, out_dtype: torch.dtype | None = None
):
    """Plain torch form of `noise_and_target`, for any device; same arguments, same results."""
    _check(latents, timesteps, alphas_cumprod, keys, draws)
    assert prediction_type in PREDICTION_TYPES, f"prediction_type {prediction_type!r}: expected one of {PREDICTION_TYPES}"
    clean = wide(latents)
    signal, spread = signal_and_spread(alphas_cumprod, timesteps, clean.dtype)
    noise = pair_noise(keys, draws, seed, tuple(latents.shape[1:]), clean.dtype).repeat(2, 1, 1, 1)
    signal, spread = signal.repeat(2, 1, 1, 1), spread.repeat(2, 1, 1, 1)
    noisy = signal * clean + spread * noise
    target = noise if prediction_type == "epsilon" else signal * noise - spread * clean
    out_dtype = out_dtype or latents.dtype
    return empty_like(latents, out_dtype).copy_(noisy), empty_like(latents, clean.dtype).copy_(target)


def noise_pairs_reference(latents, timesteps, alphas_cumprod, keys, draws, seed, *, out_dtype: torch.dtype | None = None):
    """Plain torch form of `noise_pairs`, for any device; same arguments, same result."""
    noisy, _ = noise_and_target_reference(
        latents, timesteps, alphas_cumprod, keys, draws, seed, prediction_type="epsilon", out_dtype=out_dtype
    )
    return noisy


def sample_posterior_reference(mean, std, keys, draws, seed, scale: float, shift: float = 0.0) -> torch.Tensor:
    """Plain torch form of `sample_posterior`, for any device; same arguments, same result."""
    shape, dtype = tuple(mean.shape[1:]), wide(mean).dtype
    noise = torch.cat([normal(keys, draws, stream, seed, shape, dtype) for stream in (Stream.VAE_WIN, Stream.VAE_LOSE)])
    return empty_like(mean, mean.dtype).copy_((wide(mean) + wide(std) * noise - shift) * scale)


def pair_noise(keys, draws, seed, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise [B, *shape] that `noise_pairs` adds to both halves: keys [B], draws [B] int64."""
    return normal(keys, draws, Stream.NOISE, seed, shape, dtype)


# ------------------------------------------------------------------------------------------------------------------------- ops


@torch.library.custom_op("csrc_triton::noise_pairs", mutates_args=())
def _noise_pairs(
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if runs_triton(latents):
        return _launch_noise(latents, timesteps, alphas_cumprod, keys, draws, seed, None, out_dtype)[0]
    return noise_pairs_reference(latents, timesteps, alphas_cumprod, keys, draws, seed, out_dtype=out_dtype)


@_noise_pairs.register_fake
def _(latents, timesteps, alphas_cumprod, keys, draws, seed, out_dtype):
    return empty_like(latents, out_dtype)


@torch.library.custom_op("csrc_triton::noise_and_target", mutates_args=())
def _noise_and_target(
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor,
    prediction_type: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(latents):
        return _launch_noise(latents, timesteps, alphas_cumprod, keys, draws, seed, prediction_type, out_dtype)
    return noise_and_target_reference(
        latents, timesteps, alphas_cumprod, keys, draws, seed, prediction_type=prediction_type, out_dtype=out_dtype
    )


@_noise_and_target.register_fake
def _(latents, timesteps, alphas_cumprod, keys, draws, seed, prediction_type, out_dtype):
    return empty_like(latents, out_dtype), empty_like(latents, wide(latents).dtype)


@torch.library.custom_op("csrc_triton::sample_posterior", mutates_args=())
def _sample_posterior(
    mean: torch.Tensor,
    std: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor,
    scale: float,
    shift: float,
) -> torch.Tensor:
    if runs_triton(mean):
        return _launch_posterior(mean, std, keys, draws, seed, scale, shift)
    return sample_posterior_reference(mean, std, keys, draws, seed, scale, shift)


@_sample_posterior.register_fake
def _(mean, std, keys, draws, seed, scale, shift):
    return empty_like(mean, mean.dtype)


# --------------------------------------------------------------------------------------------------------------- public functions


def _check(latents, timesteps, alphas_cumprod, keys, draws) -> None:
    assert latents.ndim == 4 and latents.shape[0] % 2 == 0, f"latents must be [2B, C, H, W], got {tuple(latents.shape)}"
    batch = latents.shape[0] // 2
    for name, value in (("timesteps", timesteps), ("keys", keys), ("draws", draws)):
        assert value.shape == (batch,) and value.dtype == torch.int64, (
            f"{name} must be int64 [{batch}], got {value.dtype} {tuple(value.shape)}"
        )
    assert alphas_cumprod.ndim == 1 and alphas_cumprod.dtype in (torch.float32, torch.float64), (
        f"alphas_cumprod must be fp32 or fp64 [T], got {alphas_cumprod.dtype} {tuple(alphas_cumprod.shape)}"
    )


def noise_pairs(
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor | int,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x_t [2B, C, H, W] of wins, then losers; win and lose of a pair share timestep and noise.

    latents [2B, C, H, W]; timesteps, keys, draws int64 [B]; alphas_cumprod [T] fp32 or fp64; seed an int64 0-d tensor on the
    device (an int is frozen inside a CUDA graph). Result in `out_dtype` (default: that of the latents) and the memory format of
    the latents. Not differentiable. Timesteps outside [0, T) are an error that only the CPU reports.
    """
    _check(latents, timesteps, alphas_cumprod, keys, draws)
    seed = seed_tensor(seed, latents.device)
    return _noise_pairs(latents, timesteps, alphas_cumprod, keys, draws, seed, out_dtype or latents.dtype)


def noise_and_target(
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor | int,
    *,
    prediction_type: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, target), both [2B, C, H, W]; the arguments of `noise_pairs` and prediction_type "epsilon" or "v_prediction".

    The target is fp32 (float64 for float64 latents) whatever `out_dtype` is: the errors are taken in fp32.
    """
    _check(latents, timesteps, alphas_cumprod, keys, draws)
    assert prediction_type in PREDICTION_TYPES, f"prediction_type {prediction_type!r}: expected one of {PREDICTION_TYPES}"
    seed = seed_tensor(seed, latents.device)
    return _noise_and_target(latents, timesteps, alphas_cumprod, keys, draws, seed, prediction_type, out_dtype or latents.dtype)


def sample_posterior(
    mean: torch.Tensor,
    std: torch.Tensor,
    keys: torch.Tensor,
    draws: torch.Tensor,
    seed: torch.Tensor | int,
    scale: float,
    shift: float = 0.0,
) -> torch.Tensor:
    """(mean + std n - shift) scale, [2B, C, H, W] in the mean's dtype and memory format; wins and losers have own streams.

    mean, std [2B, C, H, W] of one dtype; keys, draws int64 [B]; seed an int64 0-d tensor on the device or an int.
    """
    assert mean.ndim == 4 and mean.shape[0] % 2 == 0, f"mean must be [2B, C, H, W], got {tuple(mean.shape)}"
    assert std.shape == mean.shape and std.dtype == mean.dtype, f"std {std.dtype} {tuple(std.shape)} must be like mean"
    assert keys.shape == draws.shape == (mean.shape[0] // 2,), (
        f"keys {tuple(keys.shape)} and draws {tuple(draws.shape)} must be [B]"
    )
    return _sample_posterior(mean, std, keys, draws, seed_tensor(seed, mean.device), float(scale), float(shift))


_INTEGERS = {"batch": "i32", "channels": "i32", "pixels": "i32", "elements": "i32"}
_KEYS = {"keys_ptr": "*i64", "draws_ptr": "*i64", "seed_ptr": "*i64"}


def _specimens() -> list[Specimen]:
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        noising = {"latents_ptr": f"*{dtype}", "timesteps_ptr": "*i64", "noisy_ptr": f"*{dtype}", **_KEYS, **_INTEGERS}
        for code, name in enumerate(("noise_pairs", "noise_and_epsilon", "noise_and_v")):
            for alphas in ("fp32", "fp64"):
                signature = {**noising, "alphas_ptr": f"*{alphas}"} | ({"target_ptr": "*fp32"} if code else {})
                constexprs = {"TARGET": code, "CHANNELS_LAST": False, "BLOCK": BLOCK} | ({} if code else {"target_ptr": None})
                found.append(Specimen(f"{name}/abar_{alphas}", noise_pairs_kernel, dtype, signature, constexprs, WARPS))
        signature = {"mean_ptr": f"*{dtype}", "std_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **_KEYS, **_INTEGERS}
        signature |= {"scale": "fp32", "shift": "fp32"}
        constexprs = {"MEAN_LAST": False, "STD_LAST": False, "BLOCK": BLOCK}
        found.append(Specimen("sample_posterior", sample_posterior_kernel, dtype, signature, constexprs, WARPS))
    return [replace(specimen, aligned=("elements", "pixels")) for specimen in found]


AOT_SPECIMENS = _specimens()

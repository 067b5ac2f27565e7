"""A GPU's memory while images are drawn beside a training run: what is free, what they take, and how room is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo.drawing.draw import network

if TYPE_CHECKING:
    from dpo.drawing.draw import Pipeline

# Bytes at work for each byte of a feature map of full size: in the VAE's decoder one of its second width in pixels, in
# the UNet one of its first width in latents, with and without the caption. Counted, tensor by tensor: 3 in the decoder,
# 26 (SD 1.5) and 16 (SDXL) in the UNet, in fp32; the rest is for what a GPU's libraries take.
DECODED, DENOISED = 4.0, 32.0
DENOISED_AT_LEAST = 16.0
GROUPS = (4, 8, 16, 32)  # images drawn together


def free(device: torch.device) -> int | None:
    """Bytes that an allocation on `device` can still get; None on a CPU, which is never asked."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def needed(pipe: Pipeline, device: torch.device, batch: int, autocast: torch.dtype | None) -> int:
    """Bytes that drawing takes on `device`, estimated: modules that are elsewhere, casts, and `batch` images at work."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    brought = sum(_bytes(p) for module in modules for p in module.parameters() if p.device.type != device.type)
    width = torch.finfo(autocast).bits // 8 if autocast is not None else 0
    # autocast keeps its casts of weights that want a gradient
    weights = list(network(pipe).parameters())
    cast = sum(p.numel() * width for p in weights if p.requires_grad and p.element_size() > width > 0)
    side, (drawn, seen) = _side(pipe), _widths(pipe)
    decoded = DECODED * seen * (side * pipe.vae_scale_factor) ** 2 * max(4, pipe.vae.dtype.itemsize)
    denoised = DENOISED * 2 * drawn * side**2 * max(4, weights[0].dtype.itemsize)
    return brought + cast + int(batch * max(decoded, denoised))


def group_for(pipe: Pipeline, device: torch.device, width: int, height: int, guided: bool) -> int:
    """Images to draw together: on a GPU so many that the UNet takes at least what the VAE takes to decode one.

    Then decoding is never what needs the most memory. width, height: of the images, pixels; guided: the UNet
    sees each twice, with its caption and without.
    """
    if device.type != "cuda":
        return GROUPS[0]
    (drawn, seen), pixels = _widths(pipe), width * height
    latents = pixels / pipe.vae_scale_factor**2
    decoded = DECODED * seen * pixels * pipe.vae.dtype.itemsize
    dtype = next(network(pipe).parameters()).dtype
    denoised = DENOISED_AT_LEAST * (1 + guided) * drawn * latents * dtype.itemsize
    return next((count for count in GROUPS if count * denoised >= decoded), GROUPS[-1])


PATCH = 4  # latents that a transformer sees as one token
DEFAULT_SIDE = 128  # latents, of diffusers' pipelines whose transformer's config has none


def _side(pipe: Pipeline) -> int:
    """Latents of a side that the model was trained at."""
    return int(network(pipe).config.get("sample_size") or DEFAULT_SIDE)


def _widths(pipe: Pipeline) -> tuple[int, int]:
    """Channels of a feature map of full size: in the denoiser, for each latent, and in the VAE's decoder."""
    config: Any = network(pipe).config
    if "block_out_channels" in config:
        drawn = config["block_out_channels"][0]
    else:
        drawn = config["num_attention_heads"] * config["attention_head_dim"] // PATCH
    vae = pipe.vae.config
    widths = vae.get("decoder_block_out_channels") or vae.get("block_out_channels") or [vae["base_dim"]]
    return drawn, widths[min(1, len(widths) - 1)]


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


@contextmanager
def aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside the block the memory of `tensors` is on the host, and nothing may read them; at its end they are back.

    The tensors stay the same objects, so that whoever holds them, such as an optimizer, notices nothing. Memory that
    another library manages (paged optimizer states) is left alone.
    """
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors if not getattr(t, "is_paged", False))}
    moved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
    try:
        for storage in storages.values():
            if storage.resizable() and storage.nbytes():
                moved.append((storage, storage.clone() if storage.device.type == "cpu" else storage.cpu()))
                storage.resize_(0)
        yield
    finally:
        for storage, host in moved:
            storage.resize_(host.nbytes())
            storage.copy_(host)

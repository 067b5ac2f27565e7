"""How kernels address latents and predictions: dense [N, C, H, W] tensors, contiguous or channels_last.

Kernels count the elements of one sample in the C-contiguous order of (C, H, W), because keyed noise is defined in that
order; only the address depends on the memory format.
"""

import torch

from csrc_triton.language import tl, triton


@triton.jit
def element_offsets(element, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Address of element number `element` (order C, H, W) within one dense sample."""
    if CHANNELS_LAST:
        return (element % pixels) * channels + element // pixels
    return element


def addressable(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(`x` itself where it is contiguous or channels_last, else a contiguous copy; whether it is channels_last)."""
    if x.is_contiguous():
        return x, False
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor of `x`'s shape, channels_last where `x` is (and not contiguous as well), else contiguous."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format)

"""Choices made on a denoiser before training: dtypes, memory layout, attention, gradient checkpointing."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dpo.common.errors import UserError
from dpo.models.attention import kinds_of, use_one_attention, without_cudnn
from dpo.models.family import Denoiser, is_unet

log = logging.getLogger("dpo")


HALVED = (nn.Linear, nn.Conv2d)


def halve(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts frozen Linear and Conv2d weights to `dtype` in place; norms and adapters keep their dtype.

    Autocast casts the policy's fp32 weights of exactly these layers to `dtype` in every call, so a reference stored
    this way gives the same bits. Norms run in fp32 under autocast, and rounding their weights would shift the logit.
    """
    for module in denoiser.modules():
        if isinstance(module, HALVED):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return denoiser


def widen_others(denoiser: nn.Module) -> None:
    """Casts to fp32, in place, what `halve` leaves alone, and buffers."""
    for module in denoiser.modules():
        kept = () if isinstance(module, HALVED) else module.parameters(recurse=False)
        for value in (*kept, *module.buffers(recurse=False)):
            if value.is_floating_point():
                value.data = value.data.float()


def fix_projections(denoiser: nn.Module) -> None:
    """Makes the input of spatial transformers' linear input projections (SD 2.x, SDXL) contiguous, by hooks.

    In NCHW that input is a strided view. torch multiplies such a view as one matrix where a gradient is wanted and
    sample by sample where none is: in half precision the policy would differ from an equal reference by rounding.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for block in denoiser.modules():
        if isinstance(block, Transformer2DModel) and block.use_linear_projection:
            block.proj_in.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return inputs[0].contiguous(), *inputs[1:]


def available_attention(kind: str) -> str:
    """`kind`, or "sdpa" after one warning where `kind` is "xformers" and that cannot run."""
    if kind != "xformers":
        return kind
    if find_spec("xformers") is None:
        reason = "is not installed (pip install xformers)"
    elif not torch.cuda.is_available():
        reason = "needs a GPU"
    else:
        return kind
    log.warning("xformers %s: attention runs on torch's scaled_dot_product_attention", reason)
    return "sdpa"


def use_attention(denoiser: Denoiser, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Switches to xformers where `kind` asks for it and it can run, else to attention.py; transformers to the latter.

    dtype: of queries, keys and values in a step.
    """
    if not is_unet(denoiser):
        if device.type == "cuda":
            without_cudnn(denoiser)
    elif available_attention(kind) == "xformers":
        denoiser.enable_xformers_memory_efficient_attention()
    else:
        use_one_attention(denoiser, device, dtype)


def _recomputed(module: nn.Module, *args: Any) -> Any:
    """A block's output, of which the backward pass computes the inside again.

    Nothing in a step draws from a generator, so none is put back to where it was: a CUDA graph could not capture that.
    """
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)


def _recomputed_on_the_same(module: nn.Module, *args: Any) -> Any:
    """As `_recomputed`, of a transformer's block: its attention runs on the same operations when it is computed again."""
    again = lambda: (nullcontext(), sdpa_kernel(kinds_of()))  # noqa: E731  # (around the forward pass, around the other)
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=again)


def use_checkpointing(denoiser: Denoiser, setting: str) -> None:
    """Recomputes activations in the backward pass: "off", "on", or blocks such as "down_blocks.0,mid_block".

    Raises UserError for a block that the UNet does not have.
    """
    if setting == "off":
        denoiser.disable_gradient_checkpointing()
        return
    on_gpu = next(denoiser.parameters()).is_cuda
    denoiser.enable_gradient_checkpointing(_recomputed if is_unet(denoiser) or not on_gpu else _recomputed_on_the_same)
    if setting == "on":
        return
    if not is_unet(denoiser):
        raise UserError(f"--checkpointing {setting} names blocks of a UNet, and this is a transformer: use on or off")
    blocks = {
        name: module
        for name, module in denoiser.named_modules()
        if name == "mid_block" or (name.count("_blocks.") == 1 and name.count(".") == 1)
    }
    chosen = [name.strip() for name in setting.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in blocks]
    if unknown:
        raise UserError(f"--checkpointing names no such block: {', '.join(unknown)}; the UNet has {', '.join(blocks)}")
    for name, block in blocks.items():
        if name not in chosen:
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False

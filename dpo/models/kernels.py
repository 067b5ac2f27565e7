"""Runs a diffusers UNet on the fused kernels: a small forward function per kind of block, swapped in on instances.

    with patch(denoiser): ...            or            patched = patch(denoiser); ...; patched.undo()

The functions compute what diffusers' own forwards compute, with the same modules and parameters: state-dict keys do not
change, peft layers inside the blocks are called as before, and gradient checkpointing and torch.compile see ordinary
modules. Patch policy and reference alike, so that both round in the same way. A block of another kind keeps its own
forward and is named in `Patched.skipped`.

Two copies that diffusers makes are left out, since they undo channels_last: the `contiguous()` after a spatial
transformer's output projection, and the one before a residual block's shortcut convolution in training (which only
quiets a warning of DistributedDataParallel).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from csrc_triton.geglu import geglu
from csrc_triton.group_norm_silu import group_norm_silu
from csrc_triton.layer_norm import add_layer_norm, layer_norm
from dpo.models.family import Denoiser, is_unet

log = logging.getLogger("dpo")


def _group_norm(
    norm: nn.GroupNorm, x: torch.Tensor, temb: torch.Tensor | None = None, silu: bool = True
) -> torch.Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, temb, silu)


def _layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def _add_layer_norm(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return add_layer_norm(x.to(dtype), residual.to(dtype), norm.weight, norm.bias, norm.eps)


def geglu_forward(self: GEGLU, hidden_states, *args, **kwargs):
    return geglu(self.proj(hidden_states))


def group_norm_forward(self: nn.GroupNorm, x):
    return _group_norm(self, x, silu=False)


def group_norm_silu_forward(self: nn.GroupNorm, x):
    """For a norm that is followed by a SiLU module, whose forward becomes `identity_forward`."""
    return _group_norm(self, x)


def identity_forward(self: nn.SiLU, x):
    return x


def resnet_forward(self: ResnetBlock2D, input_tensor, temb, *args, **kwargs):
    """norm1, SiLU, conv1, + time embedding, norm2, SiLU, conv2, + shortcut."""
    hidden_states = self.conv1(_group_norm(self.norm1, input_tensor))
    temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    hidden_states = _group_norm(self.norm2, hidden_states, temb)
    hidden_states = self.conv2(self.dropout(hidden_states))
    shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
    output = shortcut + hidden_states
    return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


def transformer_block_forward(
    self: BasicTransformerBlock,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
):
    """Self-attention, cross-attention, feed-forward on [N, S, C]; residual adds are fused with the next LayerNorm."""
    kwargs = dict(cross_attention_kwargs or {})
    if self._chunk_size is not None or hidden_states.ndim != 3 or kwargs.get("gligen") is not None:
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    kwargs.pop("gligen", None)
    normal = _layer_norm(self.norm1, hidden_states)  # type: ignore[arg-type]  # _is_known_transformer_block checked it
    first_context = encoder_hidden_states if self.only_cross_attention else None
    attended = self.attn1(normal, encoder_hidden_states=first_context, attention_mask=attention_mask, **kwargs)
    hidden_states, normal = _add_layer_norm(self.norm2, attended, hidden_states)  # type: ignore[arg-type]  # as above
    attended = self.attn2(
        normal, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **kwargs
    )
    hidden_states, normal = _add_layer_norm(self.norm3, attended, hidden_states)  # type: ignore[arg-type]  # as above
    return self.ff(normal) + hidden_states


def spatial_output_forward(self: Transformer2DModel, hidden_states, residual, batch_size, height, width, inner_dim):
    """[N, H * W, C] -> [N, C, H, W] as a channels_last view, + residual."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    hidden_states = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
    if not self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    return hidden_states + residual


def upsample_forward(self: Upsample2D, hidden_states, output_size=None, *args, **kwargs):
    """Each pixel four times, then the convolution. Diffusers copies 64 samples and more to NCHW before torch's own upsampling."""
    if output_size is not None:
        return type(self).forward(self, hidden_states, output_size, *args, **kwargs)
    rows, channels, height, width = hidden_states.shape
    pixels = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    four = pixels.reshape(rows, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    return self.conv(four)  # type: ignore[misc]  # _patch_upsample checked it


def _is_group_norm(norm: nn.Module | None) -> TypeGuard[nn.GroupNorm]:
    return type(norm) is nn.GroupNorm and norm.affine


def _is_layer_norm(norm: nn.Module | None) -> bool:
    return (
        type(norm) is nn.LayerNorm
        and norm.elementwise_affine
        and norm.bias is not None
        and len(norm.normalized_shape) == 1
    )


def _is_known_resnet(block: ResnetBlock2D) -> bool:
    return (
        block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and block.upsample is None
        and block.downsample is None
        and isinstance(block.nonlinearity, nn.SiLU)
        and _is_group_norm(block.norm1)
        and _is_group_norm(block.norm2)
    )


def _is_known_transformer_block(block: BasicTransformerBlock) -> bool:
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and all(_is_layer_norm(norm) for norm in (block.norm1, block.norm2, block.norm3))
    )


class Patched:
    """What `patch` did to a UNet; leaving the context, or `undo`, restores every instance exactly.

    counts: kind of block -> how many run on kernels. skipped: names of blocks that keep diffusers' forward.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.skipped: list[str] = []
        self._replaced: list[tuple[nn.Module, str]] = []

    def replace(self, module: nn.Module, function: Callable, attribute: str = "forward") -> None:
        module.__dict__[attribute] = MethodType(function, module)
        self._replaced.append((module, attribute))

    def undo(self) -> None:
        for module, attribute in self._replaced:
            del module.__dict__[attribute]
        self._replaced.clear()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"fused kernels: {kinds or 'none'}" + (
            f"; as in diffusers: {', '.join(self.skipped)}" if self.skipped else ""
        )


def _patch_geglu(patched: Patched, module: GEGLU) -> bool:
    patched.replace(module, geglu_forward)
    return True


def _patch_resnet(patched: Patched, module: ResnetBlock2D) -> bool:
    if not _is_known_resnet(module):
        return False
    patched.replace(module, resnet_forward)
    return True


def _patch_upsample(patched: Patched, module: Upsample2D) -> bool:
    if not (
        module.use_conv
        and not module.use_conv_transpose
        and module.interpolate
        and module.norm is None
        and module.name == "conv"
    ):
        return False
    patched.replace(module, upsample_forward)
    return True


def _patch_transformer_block(patched: Patched, module: BasicTransformerBlock) -> bool:
    if not _is_known_transformer_block(module):
        return False
    patched.replace(module, transformer_block_forward)
    return True


def _patch_spatial_transformer(patched: Patched, module: Transformer2DModel) -> bool:
    if not (module.is_input_continuous and _is_group_norm(module.norm)):
        return False
    patched.replace(module.norm, group_norm_forward)
    patched.replace(module, spatial_output_forward, "_get_output_for_continuous_inputs")
    return True


PATCHES: dict[type[nn.Module], Callable[[Patched, Any], bool]] = {
    GEGLU: _patch_geglu,
    ResnetBlock2D: _patch_resnet,
    BasicTransformerBlock: _patch_transformer_block,
    Transformer2DModel: _patch_spatial_transformer,
    Upsample2D: _patch_upsample,
}


def _patch_output_norm(patched: Patched, denoiser: nn.Module) -> None:
    norm, activation = getattr(denoiser, "conv_norm_out", None), getattr(denoiser, "conv_act", None)
    if not (_is_group_norm(norm) and type(activation) is nn.SiLU):
        patched.skipped.append("conv_norm_out")
        return
    patched.replace(norm, group_norm_silu_forward)
    patched.replace(activation, identity_forward)
    patched.counts["output norm"] += 1


def patch(denoiser: Denoiser) -> Patched:
    """Swaps the fused forwards into `denoiser` (a UNet2DConditionModel, also with peft layers) and logs the counts.

    A transformer of flow matching keeps its own: its norms have no weights, and modulation comes between.
    """
    patched = Patched()
    if not is_unet(denoiser):
        log.info("kernels: noise, loss and optimizer; the transformer itself runs on plain torch")
        return patched
    for name, module in denoiser.named_modules():
        swap = PATCHES.get(type(module))
        if swap is None:
            continue
        if "forward" not in module.__dict__ and swap(patched, module):
            patched.counts[type(module).__name__] += 1
        else:
            patched.skipped.append(name)
    _patch_output_norm(patched, denoiser)
    log.info("%s", patched)
    return patched

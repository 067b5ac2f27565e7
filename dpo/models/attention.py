"""The UNet's attention: torch's operations, one of them fixed for each head width, the same for policy and reference.

Left to itself torch picks by device, shape and grad mode, and cuDNN's kernel then runs another plan where the statistics
for a backward pass are kept than where they are not: a policy with a gradient would differ by rounding from an equal
reference without. Here the operation is named and always keeps its statistics. Which one serves a head width is tried
once on a small call, forward and backward, with and without a gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo.common.words import first_line
from dpo.models.family import Denoiser

if TYPE_CHECKING:  # the first import of diffusers is that of `libraries.quiet`, when a model is loaded
    from diffusers.models.attention_processor import Attention

log = logging.getLogger("dpo")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query [N, H, S, D], key and value [N, H, L, D] -> [N, H, S, D]

ATEN = torch.ops.aten
BACKENDS: dict[str, Attend] = {  # the fastest first
    "cudnn": lambda q, k, v: ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0],
    "flash": lambda q, k, v: ATEN._scaled_dot_product_flash_attention(q, k, v)[0],  # has no form without statistics
    "efficient": lambda q, k, v: ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)[0],
    "math": lambda q, k, v: ATEN._scaled_dot_product_attention_math(q, k, v)[0],
}
DETERMINISTIC = ("flash", "math")  # whose backward pass sums in one order where torch is asked for that


class Attending:
    """Diffusers' own processor, with the operation named and without the division by a factor of 1.

    backends: by head width; for others, and on devices without a choice, torch's own.
    """

    def __init__(self, backends: Mapping[int, str]) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.backends = dict(backends)
        self._other = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [N, S, C]
        encoder_hidden_states: Tensor | None = None,  # [N, L, E]
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3 or not is_plain(attn):
            return self._other(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows, heads = hidden_states.shape[0], attn.heads
        query, key, value = (
            x.view(rows, -1, heads, x.shape[-1] // heads).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        backend = self.backends.get(query.shape[-1])
        attend: Attend = F.scaled_dot_product_attention if backend is None else BACKENDS[backend]
        attended = attend(query, key, value).transpose(1, 2).reshape(rows, -1, heads * query.shape[-1])
        output = attn.to_out[1](attn.to_out[0](attended.to(query.dtype)))
        return output if attn.rescale_output_factor == 1.0 else output / attn.rescale_output_factor


def is_plain(attn: Attention) -> bool:
    """Whether an attention is what SD and SDXL have: no norms of its own and no residual connection."""
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return not attn.residual_connection and all(not norm for norm in norms)


def widths(denoiser: Denoiser) -> list[int]:
    """The head widths of a denoiser's attentions, ascending."""
    from diffusers.models.attention_processor import Attention

    return sorted({int(m.inner_dim // m.heads) for m in denoiser.modules() if isinstance(m, Attention)})


def use_one_attention(denoiser: Denoiser, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every plain attention of `denoiser` this file's processor; on a GPU its operations are tried and named.

    dtype: of queries, keys and values in a step. Attentions with another processor keep theirs.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    names = DETERMINISTIC if torch.are_deterministic_algorithms_enabled() else tuple(BACKENDS)
    own: Any = Attending(_chosen(device, dtype, tuple(widths(denoiser)), names) if device.type == "cuda" else {})
    processors: dict[str, Any] = dict(denoiser.attn_processors)
    denoiser.set_attn_processor({name: own if type(p) is AttnProcessor2_0 else p for name, p in processors.items()})


def without_cudnn(denoiser: Denoiser) -> None:
    """Has every attention of a transformer run on torch's operations without cuDNN's, in each forward pass, in place.

    The others give the same bits with and without a gradient, whatever the mask. Where torch is asked for deterministic
    sums, only those of DETERMINISTIC are left. Blocks that the backward pass computes again do so outside of this: see
    `kinds_of`.
    """

    def chosen(self: Denoiser, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kinds_of()):
            return type(self).forward(self, *args, **kwargs)

    denoiser.forward = MethodType(chosen, denoiser)  # a copy's is bound to the copy


def kinds_of() -> list[SDPBackend]:
    """The operations that a transformer's attention runs on, in the forward pass and where a block is computed again."""
    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if torch.are_deterministic_algorithms_enabled() else kinds


@cache
def _chosen(
    device: torch.device, dtype: torch.dtype, head_widths: tuple[int, ...], names: tuple[str, ...]
) -> dict[int, str]:
    """`probe`, tried and said once: policy and reference have the same."""
    found, said = probe(device, dtype, head_widths, names)
    for line in said:
        log.info("%s", line)
    return found


def probe(
    device: torch.device,
    dtype: torch.dtype,
    head_widths: Sequence[int],
    names: Sequence[str],
    backends: Mapping[str, Attend] = BACKENDS,
) -> tuple[dict[int, str], list[str]]:
    """The first of `names` that serves each head width, and lines for the log.

    One serves that runs forward and backward, gives finite gradients, and the same bits with and without a gradient. A
    width that none serves is left to torch, which is said.
    """
    found: dict[int, str] = {}
    said = []
    for width in head_widths:
        refused = {}
        for name in names:
            if (why := _refused(backends[name], device, dtype, width)) is None:
                found[width] = name
                break
            refused[name] = why
        if refused:
            told = "; ".join(f"{name}: {why}" for name, why in refused.items())
            said.append(
                f"attention, head width {width}: {found.get(width, 'torch chooses')} for policy and reference ({told})"
            )
    by_name = {name: [str(width) for width in found if found[width] == name] for name in dict.fromkeys(found.values())}
    if by_name:
        served = ", ".join(f"{name} for head width {' and '.join(of)}" for name, of in by_name.items())
        said.append(f"attention: {served}")
    return found, said


def _refused(attend: Attend, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why an operation does not serve a head width, in one line; None where it does."""
    generator = torch.Generator(device).manual_seed(width)
    leaves = [
        torch.randn(2, 4, tokens, width, device=device, dtype=dtype, generator=generator).requires_grad_()
        for tokens in (128, 77, 77)
    ]
    try:
        with torch.no_grad():
            free = attend(*leaves)
        kept = attend(*leaves)
        grads = torch.autograd.grad(kept.float().square().sum(), leaves)
    except RuntimeError as error:
        return first_line(error)
    if not torch.equal(free, kept):
        return "other bits with a gradient than without"
    return None if all(bool(grad.isfinite().all()) for grad in grads) else "a gradient that is not finite"

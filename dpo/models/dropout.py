"""Dropout inside the adapters, by masks that are a function of (seed, pair key, draw, layer, element).

No generator is consumed, so the masks do not depend on the cut into micro-batches, a resumed run draws those that it
would have drawn, and a pass that gradient checkpointing recomputes meets the same ones. Both images of a pair share
their masks as they share timestep and noise: d compares the images and not two draws. Only a pass that a gradient is
taken through is masked; validation, sample images and the reference see the whole adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from csrc_triton.philox import Stream, random_bits

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

LAYER_SHIFT = 8  # the counter's stream word: a Stream in its low bits, the layer's number above


@dataclass
class Masks:
    """Whose masks the adapters apply: those of the micro-batch in progress."""

    keys: Tensor | None = None  # [B] int64
    draws: Tensor | None = None  # [B] int64
    seed: Tensor | None = None  # 0-d int64

    def set(self, keys: Tensor, draws: Tensor, seed: Tensor) -> None:
        """From here on masks are those of these B pairs; inputs have B or 2B rows, winners first."""
        self.keys, self.draws, self.seed = keys, draws, seed


class KeyedDropout(nn.Module):
    """Zeroes a share `rate` of the elements of a layer's input and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float, layer: int, masks: Masks) -> None:
        super().__init__()
        self.rate, self.layer, self.masks = rate, layer, masks

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] or [2B, ...]; elements count in C order within a row."""
        if not torch.is_grad_enabled():
            return x
        drawn = self.masks
        assert drawn.keys is not None and drawn.draws is not None and drawn.seed is not None, "PairStep sets them"
        keep = kept(drawn.keys, drawn.draws, drawn.seed, self.layer, self.rate, x.shape[1:].numel())
        pairs = x.reshape(-1, *keep.shape[:1], *x.shape[1:])  # [1 or 2, B, ...]
        return torch.where(keep.view(1, -1, *x.shape[1:]), pairs / (1 - self.rate), 0.0).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"rate={self.rate}, layer={self.layer}"


def kept(keys: Tensor, draws: Tensor, seed: Tensor, layer: int, rate: float, count: int) -> Tensor:
    """Which of `count` elements are kept [B, count] bool, for keys [B], draws [B] and a 0-d seed, all int64."""
    bits = random_bits(keys, draws, int(Stream.ADAPTER) + (layer << LAYER_SHIFT), seed, count)
    return bits >= round(rate * 2**32)


def make_keyed(layers: list[BaseTunerLayer], rate: float) -> None:
    """Puts keyed dropout in the place of peft's, which draws from a global generator."""
    masks = Masks()
    for number, by_adapter in enumerate(_dropouts(layers)):
        by_adapter["default"] = KeyedDropout(rate, number, masks)


def masks_of(layers: list[BaseTunerLayer]) -> Masks | None:
    """What all keyed dropout in `layers` reads; None without dropout."""
    inside = (by_adapter["default"] for by_adapter in _dropouts(layers))
    return next((module.masks for module in inside if isinstance(module, KeyedDropout)), None)


def _dropouts(layers: list[BaseTunerLayer]) -> Iterator[nn.ModuleDict]:
    return (cast("LoraLayer", layer).lora_dropout for layer in layers)

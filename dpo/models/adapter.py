"""A LoRA as plain tensors: what it adds to each layer, whatever file or module it comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """What a LoRA of rank r adds to a layer's weight [out, in] or [out, in, kh, kw]: alpha / r * up @ down."""

    down: Tensor  # [r, in] or [r, in, kh, kw]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def baked(self) -> Factors:
        """The same addition with alpha = rank: the scale, which some readers do not know, is in `up`."""
        return Factors(self.down, self.up * (self.alpha / self.rank), float(self.rank))

    def widened(self, rank: int) -> Factors:
        """The same addition, with its scale baked in, at a larger rank: the rest of the factors is 0."""
        baked, more = self.baked(), rank - self.rank
        down = torch.cat([baked.down, baked.down.new_zeros(more, *baked.down.shape[1:])])
        up = torch.cat([baked.up, baked.up.new_zeros(len(baked.up), more, *baked.up.shape[2:])], dim=1)
        return Factors(down, up, float(rank))


Adapter: TypeAlias = dict[str, Factors]  # by the name of the layer in the denoiser


@torch.no_grad()
def merge_into(denoiser: nn.Module, adapter: Adapter) -> None:
    """Adds what `adapter` adds to the layers' own weights, in place; the sum is made in fp32 or wider."""
    for name, factors in adapter.items():
        weight = denoiser.get_parameter(f"{name}.weight")
        wide = torch.promote_types(weight.dtype, torch.float32)
        down, up = (value.to(weight.device, wide).flatten(1) for value in factors[:2])
        added = (up @ down).view_as(weight) * (factors.alpha / factors.rank)
        weight.copy_(weight.to(wide) + added)


def even(adapter: Adapter) -> Adapter:
    """The same additions with one rank and one alpha for all layers: as they are where they have, else widened."""
    if len({(factors.rank, factors.alpha) for factors in adapter.values()}) == 1:
        return adapter
    rank = max(factors.rank for factors in adapter.values())
    return {name: factors.widened(rank) for name, factors in adapter.items()}


def endings(layers: Collection[str], modules: Collection[str]) -> tuple[str, ...]:
    """The shortest ends of names, such as "to_q", that all of `layers` and no other of `modules` have."""
    others = {end for module in modules if module not in layers for end in _ends(module)}
    return tuple(dict.fromkeys(next(end for end in _ends(layer) if end not in others) for layer in layers))


def _ends(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[first:]) for first in reversed(range(len(words)))]


def joined(first: Adapter, second: Adapter) -> Adapter:
    """One adapter that adds what both add. Every layer has the same rank, the largest sum of the two.

    Readers that know one rank and no alpha read it right.
    """
    both: Adapter = {}
    for name in sorted(first.keys() | second.keys()):
        parts = [adapter[name].baked() for adapter in (first, second) if name in adapter]
        down, up = torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1)
        both[name] = Factors(down, up, float(len(down)))
    return even(both)


def peft(adapter: Adapter) -> dict[str, Tensor]:
    """peft's names, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, with the scale baked in.

    Alpha has no place there that every reader looks at: some take the metadata of the file, others 1 for the scale.
    """
    return {
        f"{name}.{part}.weight": value
        for name, factors in adapter.items()
        for part, value in zip(("lora_A", "lora_B"), factors.baked()[:2], strict=True)
    }


def kohya(adapter: Adapter, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The names of kohya's sd-scripts: `lora_unet_LAYER.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    name_of: a layer's name in the denoiser -> its name there, with dots.
    """
    named: dict[str, Tensor] = {}
    for name, (down, up, alpha) in adapter.items():
        stem = "lora_unet_" + name_of(name).replace(".", "_")
        named |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return named

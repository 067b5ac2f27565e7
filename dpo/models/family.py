"""What the trainer must know of an architecture. The families it knows, one file each, are named in `NAMES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

NAMES = ("sd", "sdxl")


class TextEncoding(NamedTuple):
    """hidden [B, S, D], and for SDXL pooled [B, P], of B captions."""

    hidden: Tensor
    pooled: Tensor | None = None

    def twice(self) -> TextEncoding:
        """For both halves of a micro-batch, [2B, ...]: the captions of a pair are encoded once."""
        return TextEncoding(*(None if x is None else x.repeat(2, *[1] * (x.dim() - 1)) for x in self))

    def to(self, device: Any, dtype: Any = None) -> TextEncoding:
        return TextEncoding(*(None if x is None else x.to(device, dtype, non_blocking=True) for x in self))


@dataclass
class Model:
    """A loaded model: modules, tokenizers and where they came from."""

    family: Family
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: list[nn.Module]
    tokenizers: list[Any]
    scheduler_config: dict
    source: str  # as the user named it
    folder: Path | None  # the local diffusers folder, if there is one
    turbo: bool = False
    prediction_type: str = "epsilon"  # final, after any override

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, 8 for every published SD model."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        return int(self.denoiser.config.sample_size) * self.vae_scale


@dataclass(frozen=True)
class Family:
    """One architecture. `encode(components, captions)` and `condition(text, micro)` hold all that differs in a step."""

    name: str
    pipeline: str  # the diffusers pipeline class, as in model_index.json's `_class_name`
    beta: float  # default of dpo (docs/method.md)
    guidance: float  # default guidance scale of sample images
    tokenizers: tuple[str, ...]
    text_encoders: tuple[tuple[str, str], ...]  # (component, transformers class)
    encode: Callable[[Model, list[str]], TextEncoding]
    condition: Callable[[TextEncoding, Tensor | None], dict]  # keyword arguments of the UNet beyond x_t and t


@cache
def families() -> dict[str, Family]:
    """Every family by its name; a new one is a file beside sd.py and its name in NAMES."""
    return {name: import_module(f"dpo.models.{name}").FAMILY for name in NAMES}

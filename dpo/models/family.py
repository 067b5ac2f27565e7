"""What the trainer must know of an architecture. settings/families.py lists the families, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpo.common.device import moved
from dpo.settings.families import FAMILIES

if TYPE_CHECKING:  # from diffusers' own files: its public names are placeholder classes to a type checker
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer

    from dpo.models.adapter import Adapter
    from dpo.models.checks import Check

    class Denoiser(UNet2DConditionModel):
        """The network that is trained. A family whose network is of another class widens this type."""

        to = nn.Module.to  # type: ignore[assignment]  # diffusers' own is wrapped so that its type is lost

    class Vae(AutoencoderKL):
        to = nn.Module.to  # type: ignore[assignment]  # as above

    class TextEncoder(nn.Module):
        """A text model of transformers, by the attributes that are used here."""

        config: CLIPTextConfig

        def save_pretrained(self, folder: Path, **options: Any) -> None: ...
else:
    Denoiser = Vae = TextEncoder = nn.Module


class TextEncoding(NamedTuple):
    """B encoded captions: hidden states [B, S, D], and for SDXL a pooled vector [B, P], in the text encoder's dtype."""

    hidden: Tensor
    pooled: Tensor | None = None

    def twice(self) -> TextEncoding:
        """The encoding [2B, ...] for both halves of a micro-batch: the caption of a pair is encoded once."""
        return self._each(lambda x: x.repeat(2, *[1] * (x.dim() - 1)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEncoding:
        """The same encoding on another device, and in another dtype where one is given."""
        return self._each(lambda x: moved(x, device, dtype))

    def zero_where(self, rows: Tensor) -> TextEncoding:
        """The same encoding with zeros in the `rows` [B] bool."""
        return self._each(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), 0.0))

    def _each(self, function: Callable[[Tensor], Tensor]) -> TextEncoding:
        return TextEncoding(function(self.hidden), None if self.pooled is None else function(self.pooled))


class Denoise(Protocol):
    """Policy or reference: the prediction [N, C, h, w] for noisy latents x_t [N, C, h, w] at timesteps t [N].

    sizes [N, 6]: original height, width, crop top, left, target height, width of each image in pixels; None where
    the family does not ask for them.
    """

    def __call__(self, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor: ...


@dataclass
class Model:
    """A loaded model: modules, tokenizers and where they came from."""

    family: Family
    denoiser: Denoiser
    vae: Vae
    text_encoders: list[TextEncoder]
    tokenizers: list[CLIPTokenizer]
    scheduler_config: dict[str, Any]  # of the diffusers scheduler; once settings are decided: of what is trained
    source: str  # as the user named it
    folder: Path | None  # the local diffusers folder, if there is one
    turbo: bool = False
    notes: list[str] = field(default_factory=list)  # lines for the log: what it says of itself, and what it left unsaid
    merged: Adapter | None = None  # a LoRA that was merged into the denoiser: a saved adapter contains it
    pipeline_config: dict[str, Any] = field(default_factory=dict)  # settings of the source's model_index.json
    resampled: dict[str, Any] = field(default_factory=dict)  # where scheduler_config departs from the source's

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: "epsilon" or "v_prediction"."""
        return self.scheduler_config["prediction_type"]

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, 8 for every published SD model."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def side_factor(self) -> int:
        """What the sides of images must be a multiple of, in pixels, to be halved exactly by VAE and denoiser."""
        return self.vae_scale * 2 ** (len(self.denoiser.config["block_out_channels"]) - 1)

    @property
    def native_resolution(self) -> int:
        """Pixels of a side that the model was trained at."""
        return int(self.denoiser.config["sample_size"]) * self.vae_scale


@dataclass(frozen=True)
class Family:
    """One architecture: everything in which the models that the trainer knows differ."""

    name: str
    pipeline: str  # the diffusers pipeline class, as in model_index.json's `_class_name`
    denoiser: str  # the component's name in that pipeline and its folder: "unet"
    denoiser_class: str  # of diffusers
    beta: float  # default of dpo (docs/method.md)
    guidance: float  # default guidance scale of sample images
    tokenizers: tuple[str, ...]  # component names, beside `text_encoders`
    text_encoders: tuple[tuple[str, str], ...]  # (component, transformers class)
    encode: Callable[[Model, list[str]], TextEncoding]
    predict: Callable[[nn.Module, Tensor, Tensor, TextEncoding, Tensor | None], Tensor]  # (module, x_t, t, text, sizes)
    pipeline_options: Callable[[Model], dict[str, Any]]  # of the pipeline class, beside its components
    single_file_key: str  # a prefix of keys, in a checkpoint of the original layout, that no earlier family has
    single_file_options: Mapping[str, Any] = field(default_factory=dict)  # of the class's `from_single_file`
    checks: tuple[Check, ...] = ()  # what it assumes of the configs, beside what every family does
    architectures: tuple[str, ...] = ()  # how `modelspec.architecture` of its single files begins
    vae_class: str = "AutoencoderKL"  # of diffusers
    vae_overflows_in_fp16: bool = False
    kohya_name: Callable[[str, Denoiser], str] = lambda name, denoiser: name  # of a layer, in sd-scripts' LoRA files

    def denoise(self, module: nn.Module) -> Denoise:
        """`module` (the denoiser, compiled or not) behind the call that all families share."""
        return partial(self.predict, module)


@cache
def families() -> dict[str, Family]:
    """Every family by its name; a new one is a file beside sd.py and its name in FAMILIES."""
    return {name: import_module(f"dpo.models.{name}").FAMILY for name in FAMILIES}

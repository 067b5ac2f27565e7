"""What the trainer must know of an architecture. settings/families.py lists the families, one file each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpo.common.device import moved
from dpo.schedule import FLOW, shift_by_tokens
from dpo.settings.families import FAMILIES, LONGEST_CAPTION

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
    """B encoded captions, in the text encoder's dtype; what a family has none of is None.

    hidden [B, S, D]: hidden states; pooled [B, P]: a vector of the whole caption; mask [B, S] bool: which of the S tokens
    are the caption's, where the denoiser must not see the others.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def twice(self) -> TextEncoding:
        """The encoding [2B, ...] for both halves of a micro-batch: the caption of a pair is encoded once."""
        return self._each(lambda x: x.repeat(2, *[1] * (x.dim() - 1)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEncoding:
        """The same encoding on another device, and in another dtype where one is given."""
        return self._each(lambda x: moved(x, device, None if x.dtype == torch.bool else dtype))

    def zero_where(self, rows: Tensor) -> TextEncoding:
        """The same encoding with zeros in the `rows` [B] bool."""
        return self._each(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), 0))

    def row(self, one: slice) -> TextEncoding:
        """The encoding of some of the captions."""
        return self._each(lambda x: x[one])

    def _each(self, function: Callable[[Tensor], Tensor]) -> TextEncoding:
        hidden, *others = (None if x is None else function(x) for x in self)
        assert hidden is not None, "every family has it"
        return TextEncoding(hidden, *others)


def is_unet(denoiser: Denoiser) -> bool:
    """Whether a denoiser of diffusers is a UNet, and not a transformer."""
    return "down_block_types" in denoiser.config


BLOCK = re.compile(r"(\w*_)?blocks\.\d+")


def repeated(transformer: Denoiser) -> dict[str, nn.Module]:
    """The blocks that repeat in a transformer, by name."""
    return {name: module for name, module in transformer.named_modules() if BLOCK.fullmatch(name)}


class Denoise(Protocol):
    """Policy or reference: the prediction [N, C, h, w] for noisy latents x_t [N, C, h, w] at timesteps t [N].

    Of a flow t is 1000 s, with s the noise level: see `schedule.NoisePath.told`.

    sizes [N, 6]: original height, width, crop top, left, target height, width of each image in pixels; None where
    the family does not ask for them.
    """

    def __call__(self, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor: ...


class Geometry(NamedTuple):
    """How images and latents of a model fit."""

    channels: int  # of the latents
    vae_scale: int  # pixels per latent, 8 for every published SD model
    side_factor: int  # what the sides of images must be a multiple of, in pixels
    native: int  # pixels of a side that the model was trained at
    largest: int | None = None  # pixels of a side that it can take; None: any

    def tokens(self, height: int, width: int) -> int:
        """The tokens of an image in a transformer that sees one for each `side_factor` squared."""
        return (height // self.side_factor) * (width // self.side_factor)


def levels_of(vae: Mapping[str, Any]) -> int:
    """Pixels per latent of an AutoencoderKL of this config: it halves between its blocks."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def unet_geometry(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Of a UNet and its VAE; sides are to be halved exactly by both."""
    scale = levels_of(vae)
    factor = scale * 2 ** (len(unet["block_out_channels"]) - 1)
    return Geometry(vae["latent_channels"], scale, factor, int(unet["sample_size"]) * scale)


def posterior(vae: Vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [N, C, h, w] of the VAE's posterior for pixels [N, 3, H, W] in -1..1."""
    found = vae.encode(pixels).latent_dist
    return found.mean, found.std


def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] in about -1..1 of latents [N, C, h, w] as `posterior` gives them."""
    return vae.decode(latents, return_dict=False)[0]


def scaling(vae: Vae) -> tuple[list[float], list[float]]:
    """The shift and scale of each channel: the denoiser sees (latents - shift) scale."""
    config, channels = vae.config, vae.config["latent_channels"]
    return [config.get("shift_factor") or 0.0] * channels, [config["scaling_factor"]] * channels


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
    scaling: tuple[list[float], list[float]] | None = None  # of the latents, from the VAE before it was cast
    text_tokens: int | None = None  # of a caption, where the family lets that be chosen
    guidance: float | None = None  # what a model that takes its guidance scale as an input is told in training

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: "epsilon", "v_prediction" or "flow_prediction"."""
        return FLOW if self.family.flow else self.scheduler_config["prediction_type"]

    @property
    def geometry(self) -> Geometry:
        return self.family.geometry(self.denoiser.config, self.vae.config)

    def denoise(self, module: nn.Module) -> Denoise:
        """`module` (the denoiser, compiled or not) behind the call that all families share.

        The `predict` of a family whose models may take their guidance scale as an input takes it as `guidance`.
        """
        told = {} if self.guidance is None else {"guidance": self.guidance}
        return partial(self.family.predict, module, **told)

    def named_encoders(self) -> dict[str, TextEncoder | None]:
        """The text encoders by their component's name in the pipeline; None for one that the model came without."""
        return {name: one for (name, _), one in zip_longest(self.family.text_encoders, self.text_encoders)}

    def named_tokenizers(self) -> dict[str, Any]:
        """The tokenizers likewise."""
        return {name: one for (name, _), one in zip_longest(self.family.tokenizers, self.tokenizers)}


# The layers of attention over image and text together, as public trainers adapt them.
JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)


@dataclass(frozen=True)
class Flow:
    """What the families of flow matching differ in, beside what all families do."""

    text_tokens: int  # of a caption by default, as its pipeline has it
    blank: Callable[[Model], TextEncoding]  # of one caption, on the meta device: the shapes of an encoding
    even_steps: bool = True  # its pipeline gives the scheduler evenly spaced levels, and not their number alone
    longest: int = LONGEST_CAPTION  # tokens of a caption at most, as its pipeline has it
    # Of a dynamic shift: (scheduler, tokens of the image, steps of sampling).
    mu: Callable[[Mapping[str, Any], int, int], float] = lambda scheduler, tokens, steps: shift_by_tokens(
        scheduler, tokens
    )
    steps: int | None = None  # of the sampling whose shift is trained with, where mu depends on them


@dataclass(frozen=True)
class Family:
    """One architecture: everything in which the models that the trainer knows differ."""

    name: str
    pipeline: str  # the diffusers pipeline class, as in model_index.json's `_class_name`
    denoiser: str  # the component's name in that pipeline and its folder: "unet" or "transformer"
    denoiser_class: str  # of diffusers
    beta: float  # default of dpo (docs/method.md)
    guidance: float  # default guidance scale of sample images
    tokenizers: tuple[tuple[str, str], ...]  # (component, transformers class), beside `text_encoders`
    text_encoders: tuple[tuple[str, str], ...]  # (component, transformers class)
    encode: Callable[[Model, list[str]], TextEncoding]
    predict: Callable[[nn.Module, Tensor, Tensor, TextEncoding, Tensor | None], Tensor]  # (module, x_t, t, text, sizes)
    pipeline_options: Callable[[Model], dict[str, Any]]  # of the pipeline class, beside its components
    checks: tuple[Check, ...]  # what it assumes of the configs, beside that no weights are quantised
    single_file_key: str | None = (
        None  # a prefix of keys, in a checkpoint of the original layout, that no earlier family has
    )
    single_file_options: Mapping[str, Any] = field(default_factory=dict)  # of the class's `from_single_file`
    architectures: tuple[str, ...] = ()  # how `modelspec.architecture` of its single files begins
    vae_class: str = "AutoencoderKL"  # of diffusers
    vae_overflows_in_fp16: bool = False
    kohya_name: Callable[[str, Denoiser], str] | None = (
        None  # of a layer, in sd-scripts' LoRA files; None: no such files
    )
    geometry: Callable[[Mapping[str, Any], Mapping[str, Any]], Geometry] = (
        unet_geometry  # (denoiser, VAE), their configs
    )
    posterior: Callable[[Vae, Tensor], tuple[Tensor, Tensor]] = posterior
    decode: Callable[[Vae, Tensor], Tensor] = decode
    scaling: Callable[[Vae], tuple[list[float], list[float]]] = scaling
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # layers that get an adapter by default
    flow: Flow | None = None  # of a family of flow matching
    optional: tuple[str, ...] = ()  # components that a pipeline may come without: the last ones of the lists above
    # Of a model distilled to four steps: (denoiser, model_index.json, scheduler), their configs.
    few_steps: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], bool] = lambda *configs: False


@cache
def families() -> dict[str, Family]:
    """Every family by its name; a new one is a file beside sd.py and its name in FAMILIES."""
    return {name: import_module(f"dpo.models.{name}").FAMILY for name in FAMILIES}

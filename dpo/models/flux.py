"""FLUX.1, dev and schnell: rectified flow on latents in packs of four, CLIP's pooled vector and the states of T5.

Black Forest Labs 2024, as diffusers' FluxPipeline runs it. What FLUX.2 (flux2.py) shares stands here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.models.checks import DEFAULTED, Check, Configs, equal, number, scaling_said
from dpo.models.family import JOINT_ATTENTION, Family, Flow, Geometry, Model, TextEncoding, levels_of
from dpo.models.text import T5_TOKENIZER, TOKENIZER, run_encoder
from dpo.settings.families import PIPELINES

PACK = 2  # latents of a side that are one token


def as_tokens(x_NCHW: Tensor) -> Tensor:
    """Latents [N, C, h, w] as tokens [N, h w, C], row by row."""
    return x_NCHW.flatten(2).transpose(1, 2).contiguous()


def as_latents(x_NSC: Tensor, height: int, width: int) -> Tensor:
    """Tokens [N, h w, C] as latents [N, C, h, w]."""
    return x_NSC.transpose(1, 2).unflatten(2, (height, width))


def places(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Where each token of an image is: [h w, axes] int64, its row in the second axis and its column in the third."""
    ids = torch.zeros(height, width, axes, dtype=torch.int64, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> the states of T5 [B, S, D], S tokens with their padding, which this model attends to, and CLIP's
    pooled vectors [B, P]."""
    (short, long), (clip, t5) = model.tokenizers, model.text_encoders
    pooled = run_encoder(short, clip, captions).pooler_output
    return TextEncoding(run_encoder(long, t5, captions, model.text_tokens)[0], pooled)


def blank(model: Model) -> TextEncoding:
    """See `family.Flow`."""
    config, tokens = model.denoiser.config, model.text_tokens
    assert tokens is not None, "of a flow"
    hidden = torch.empty(1, tokens, config["joint_attention_dim"], device="meta")
    return TextEncoding(hidden, torch.empty(1, config["pooled_projection_dim"], device="meta"))


def predict(
    module: nn.Module,
    x_t: Tensor,
    t: Tensor,
    text: TextEncoding,
    sizes: Tensor | None,
    guidance: float | None = None,
) -> Tensor:
    """See `family.Denoise` and `Model.denoise`; `sizes` is not used."""
    packed = F.pixel_unshuffle(x_t, PACK)
    height, width = packed.shape[2:]
    told = None if guidance is None else torch.full((len(x_t),), guidance, dtype=torch.float32, device=x_t.device)
    found = module(
        hidden_states=as_tokens(packed),
        timestep=t / 1000,
        guidance=told,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.hidden,
        txt_ids=torch.zeros(text.hidden.shape[1], 3, dtype=torch.int64, device=x_t.device),
        img_ids=places(height, width, 3, x_t.device),
        return_dict=False,
    )[0]
    return F.pixel_shuffle(as_latents(found, height, width), PACK)


def geometry(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Of latents that are packed in front of the transformer. The VAE alone says the size of images: 1024."""
    scale = levels_of(vae)
    return Geometry(vae["latent_channels"], scale, PACK * scale, int(vae["sample_size"]))


def few_steps(transformer: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
    """Whether the configs are those of schnell: no guidance as an input, and noise levels that nothing shifts.

    Models of FLUX.1 without that input that are not distilled to four steps have dev's scheduler, which shifts.
    """
    plain = not scheduler["use_dynamic_shifting"] and scheduler["shift"] == 1.0
    return plain and not transformer["guidance_embeds"]


INPUTS = {  # channels that a transformer takes, by those of the packed latents: what such a model is
    6: "FLUX.1 Fill, for inpainting: its transformer also takes a mask and a masked image",
    2: "FLUX.1 Depth or Canny, or made by one of their kind: its transformer also takes a control image",
}


def channels_match(configs: Configs) -> str | None:
    """A check that the transformer takes and gives the VAE's latents, packed."""
    transformer, packed = configs["transformer"], PACK**2 * configs["vae"]["latent_channels"]
    taken, given = transformer["in_channels"], transformer.get("out_channels") or transformer["in_channels"]
    if taken == given == packed:
        return None
    if taken % packed == 0 and (more := INPUTS.get(taken // packed)):
        return f"the model is {more} ({taken} channels), and it is no text-to-image model"
    return (
        f"the transformer takes {taken} channels and gives {given}, but the packed latents of the VAE have {packed}: they "
        "are of different models"
    )


def width_matches(key: str, part: str, width: str, times: int = 1) -> Check:
    """A check that the transformer's `key` is the `width` of a text encoder's config, so many times side by side."""

    def check(configs: Configs) -> str | None:
        taken, given = configs["transformer"][key], configs[part][width] * times
        if taken == given:
            return None
        return f"the transformer takes text of width {taken} ({key}), but {part} gives {given}: they are of different models"

    return check


def turns_match(axes: int) -> Check:
    """A check that the rotary embedding has so many axes, which fill an attention head."""

    def check(configs: Configs) -> str | None:
        config = configs["transformer"]
        dims, head = list(config["axes_dims_rope"]), config["attention_head_dim"]
        if len(dims) == axes and sum(dims) == head and not any(dim % 2 for dim in dims):
            return None
        return (
            f"the transformer's config has axes_dims_rope {dims}: {axes} even numbers that sum to {head} are expected"
        )

    return check


def size_said(configs: Configs) -> str | None:
    """A check that the VAE says the size of images, where diffusers' class would say another one."""
    if "sample_size" in configs["vae"].get(DEFAULTED, ()):
        return (
            "the vae's config has no sample_size: add the side of the images that the model was trained at, in pixels"
        )
    return None


SHARED: tuple[Check, ...] = (
    equal("transformer", "patch_size", 1),
    number("transformer", "in_channels"),
    number("vae", "latent_channels"),
    number("vae", "sample_size"),
    channels_match,
)

FAMILY = Family(
    name="flux",
    pipeline=PIPELINES["flux"],
    denoiser="transformer",
    denoiser_class="FluxTransformer2DModel",
    beta=2000.0,
    guidance=3.5,
    tokenizers=(("tokenizer", TOKENIZER), ("tokenizer_2", T5_TOKENIZER)),
    text_encoders=(("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")),
    encode=encode,
    predict=predict,
    pipeline_options=lambda model: {},
    checks=(
        *SHARED,
        size_said,
        number("vae", "scaling_factor", whole=False),
        number("vae", "shift_factor", whole=False),
        scaling_said,
        turns_match(3),
        width_matches("joint_attention_dim", "text_encoder_2", "d_model"),
        width_matches("pooled_projection_dim", "text_encoder", "hidden_size"),
    ),
    geometry=geometry,
    lora_targets=(
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    flow=Flow(text_tokens=512, blank=blank, longest=512),
    few_steps=few_steps,
)

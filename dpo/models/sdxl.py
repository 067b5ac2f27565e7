"""Stable Diffusion XL and SDXL-Turbo: two text encoders, conditioned on image size and crop (Podell et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo.models.checks import REFINER, UNET, Configs, equal, number, scaling_said, text_width
from dpo.models.family import Denoiser, Family, Model, TextEncoding
from dpo.models.original import unet_layer
from dpo.models.text import TOKENIZER, run_encoder
from dpo.settings.families import PIPELINES


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> the encoders' penultimate states side by side [B, S, D1 + D2], the second's projection [B, P]."""
    outputs = [
        run_encoder(tokenizer, encoder, captions, output_hidden_states=True)
        for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True)
    ]
    return TextEncoding(torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[-1][0])


def predict(module: nn.Module, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
    """See `family.Denoise`. The sizes stay in fp32: bf16 has 8 significant bits and would round 765 to 764.

    Raises ValueError without `sizes`.
    """
    if sizes is None:
        raise ValueError("SDXL needs each image's micro-conditioning")
    wide = torch.promote_types(text.hidden.dtype, torch.float32)
    added = {"text_embeds": text.pooled, "time_ids": sizes.to(wide)}
    return module(x_t, t, encoder_hidden_states=text.hidden, added_cond_kwargs=added, return_dict=False)[0]


def pipeline_options(model: Model) -> dict[str, Any]:
    """A pipeline that puts no watermark into its images."""
    return {"add_watermarker": False}


def pooled_and_sizes(configs: Configs) -> str | None:
    """A check that the UNet takes the second encoder's pooled text and six sizes; the refiner takes five."""
    unet, pooled = configs["unet"], configs["text_encoder_2"]["projection_dim"]
    given, taken = 6 * unet["addition_time_embed_dim"] + pooled, unet["projection_class_embeddings_input_dim"]
    if taken == given:
        return None
    if taken == given - unet["addition_time_embed_dim"]:
        return f"the model is {REFINER}"
    return f"the UNet takes {taken} numbers for pooled text and sizes, but is given {given}"


def kohya_name(name: str, denoiser: Denoiser) -> str:
    """A layer's name in the original code of SDXL, whose UNet sd-scripts trains."""
    levels = {level for level, kind in enumerate(denoiser.config["up_block_types"]) if "Attn" in kind}
    return unet_layer(name, int(denoiser.config["layers_per_block"]), levels)


FAMILY = Family(
    name="sdxl",
    pipeline=PIPELINES["sdxl"],
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    beta=5000.0,
    guidance=5.0,
    tokenizers=(("tokenizer", TOKENIZER), ("tokenizer_2", TOKENIZER)),
    text_encoders=(("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")),
    encode=encode,
    predict=predict,
    pipeline_options=pipeline_options,
    single_file_key="conditioner.embedders.1.",
    checks=(
        *UNET,
        equal("unet", "addition_embed_type", "text_time"),
        number("unet", "addition_time_embed_dim"),
        number("unet", "projection_class_embeddings_input_dim"),
        pooled_and_sizes,
        text_width("text_encoder", "text_encoder_2"),
        scaling_said,
    ),
    architectures=("stable-diffusion-xl-v1-base", "stable-diffusion-xl-turbo"),
    vae_overflows_in_fp16=True,
    kohya_name=kohya_name,
)

"""Stable Diffusion XL and SDXL-Turbo: two text encoders, conditioned on image size and crop (Podell et al. 2023)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from dpo.models.checks import REFINER, Configs, equal, number, scaling_said, text_width
from dpo.models.family import Denoiser, Family, Model, TextEncoding
from dpo.models.text import run_encoder


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


PLACE = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def kohya_name(name: str, denoiser: Denoiser) -> str:
    """A layer's name in the original code of SDXL, whose UNet sd-scripts trains: flat lists of blocks.

    A level of n resnets fills n + 1 places of `input_blocks` (the last one samples down) and, having n + 1 resnets,
    as many of `output_blocks` (where the last one also samples up).
    """
    if (match := PLACE.fullmatch(name)) is None:
        return STEM.get(name, name)
    side, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    layers = int(denoiser.config["layers_per_block"])
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    at = level * (layers + 1) + (layers if kind.endswith("samplers") else number)
    if kind == "downsamplers":
        return f"input_blocks.{1 + at}.0.op"
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2}[kind]
    return f"input_blocks.{1 + at}.{inner}.{rest}" if side == "down_blocks" else f"output_blocks.{at}.{inner}.{rest}"


FAMILY = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    beta=5000.0,
    guidance=5.0,
    tokenizers=("tokenizer", "tokenizer_2"),
    text_encoders=(("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")),
    encode=encode,
    predict=predict,
    pipeline_options=pipeline_options,
    single_file_key="conditioner.embedders.1.",
    checks=(
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

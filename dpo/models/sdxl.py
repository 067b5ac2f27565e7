"""Stable Diffusion XL and SDXL-Turbo: two text encoders, conditioned on image size and crop (Podell et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo.models.family import Family, Model, TextEncoding
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
    """SDXL encodes an empty prompt as zeros; Turbo, which samples without guidance, by its text encoders."""
    return {"add_watermarker": False, "force_zeros_for_empty_prompt": not model.turbo}


FAMILY = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    beta=5000.0,
    guidance=5.0,
    tokenizers=("tokenizer", "tokenizer_2"),
    text_encoders=(("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")),
    encode=encode,
    predict=predict,
    pipeline_options=pipeline_options,
    single_file_key="conditioner.embedders.1.",
    vae_overflows_in_fp16=True,
)

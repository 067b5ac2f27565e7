"""Stable Diffusion XL and SDXL-Turbo: two text encoders and per-image size and crop conditioning (Podell et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo.models.family import Family, Model, TextEncoding
from dpo.models.text import run_encoder


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> both encoders' penultimate states side by side [B, S, D1 + D2], the second's projection [B, P]."""
    outputs = [
        run_encoder(tokenizer, encoder, captions, output_hidden_states=True)
        for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True)
    ]
    return TextEncoding(torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[-1][0])


def condition(text: TextEncoding, micro: Tensor | None) -> dict:
    """micro [N, 6]: original height, width, crop top, left, target height, width of each image, in pixels.

    The sizes stay in fp32: bf16 has 8 bits, and would make 764 of 765.
    """
    if micro is None:
        raise ValueError("SDXL needs each image's micro-conditioning")
    return {
        "encoder_hidden_states": text.hidden,
        "added_cond_kwargs": {
            "text_embeds": text.pooled,
            "time_ids": micro.to(torch.promote_types(text.hidden.dtype, torch.float32)),
        },
    }


FAMILY = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    beta=5000.0,
    guidance=5.0,
    tokenizers=("tokenizer", "tokenizer_2"),
    text_encoders=(("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")),
    encode=encode,
    condition=condition,
)

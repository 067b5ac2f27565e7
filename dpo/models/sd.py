"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction): one CLIP text encoder, no micro-conditioning."""

from __future__ import annotations

from torch import Tensor

from dpo.models.family import Family, Model, TextEncoding
from dpo.models.text import run_encoder


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> the last hidden state [B, S, D]."""
    return TextEncoding(run_encoder(model.tokenizers[0], model.text_encoders[0], captions)[0])


def condition(text: TextEncoding, micro: Tensor | None) -> dict:
    return {"encoder_hidden_states": text.hidden}


FAMILY = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    beta=2000.0,
    guidance=7.5,
    tokenizers=("tokenizer",),
    text_encoders=(("text_encoder", "CLIPTextModel"),),
    encode=encode,
    condition=condition,
)

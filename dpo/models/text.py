"""Tokenizing captions, shared by the families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo.models.family import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


def token_ids(tokenizer: CLIPTokenizer, encoder: TextEncoder | CLIPTextModel, captions: list[str]) -> Tensor:
    """Captions, padded and cut to the encoder's length: [B, S] int64 on the encoder's device."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids.to(next(encoder.parameters()).device)


@torch.no_grad()
def run_encoder(tokenizer: CLIPTokenizer, encoder: TextEncoder, captions: list[str], **options: Any) -> Any:
    """The output of a transformers text encoder for B captions; `options` go to its forward."""
    return encoder(token_ids(tokenizer, encoder, captions), **options)

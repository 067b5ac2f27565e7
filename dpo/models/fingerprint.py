"""Identities of models: short hashes that are equal for equal weights and tokenizers."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo.common.words import digest
from dpo.models.family import Model

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def fingerprint(module: nn.Module) -> str:
    """A 64-bit hash, hexadecimal, of the names, shapes and some values of a module's weights; equal for equal weights.

    Reads at most 64 evenly spread values of each tensor, in float32: cheap enough for every start, and a fine-tuned
    copy differs.
    """
    total = hashlib.blake2b(digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64).long()
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(flat[at.to(flat.device)].float().cpu().numpy().tobytes())
    return total.hexdigest()


def content(*modules: nn.Module) -> str:
    """A hash, hexadecimal, of every value of the modules' weights, in the dtype and on the device that they are in."""
    total = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy())
    return total.hexdigest()


PROBES = ("", "a photograph of a red fox, 35 mm", "Ünïcode — 狐 🦊 \n\t tab", "word " * 100)


def identity(model: Model) -> dict[str, Any]:
    """What a store's encodings depend on in a freshly loaded model (fp32, CPU): VAE, text encoders and tokenizers."""
    return {
        "family": model.family.name,
        "vae": fingerprint(model.vae),
        "text_encoders": [fingerprint(encoder) for encoder in model.text_encoders],
        "tokenizers": [_tokenizer_fingerprint(tokenizer) for tokenizer in model.tokenizers],
    }


def _tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> str:
    ids = tokenizer(
        list(PROBES), padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    ).input_ids
    return digest(json.dumps(sorted(tokenizer.get_vocab().items())), json.dumps(ids))

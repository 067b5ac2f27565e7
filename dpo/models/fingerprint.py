"""Identities of models: hashes that are equal for equal weights and tokenizers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from dpo.common.tokenizers import tokenizer_digest
from dpo.common.words import digest
from dpo.models.family import Model
from dpo.models.text import bare_names


def fingerprint(module: nn.Module) -> str:
    """A 64-bit hash, hexadecimal, of the names, shapes and some values of a module's weights; equal for equal weights.

    Reads at most 64 evenly spread values of each tensor, in float32: cheap enough for every start, and a fine-tuned
    copy differs.
    """
    total = hashlib.blake2b(digest_size=8)
    for name, value in sorted(bare_names(module.state_dict()).items()):
        flat = value.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64).long()
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(flat[at.to(flat.device)].float().cpu().numpy().tobytes())
    return total.hexdigest()


def checksum(*modules: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A 128-bit hash, hexadecimal, of every weight and buffer of some modules, with names, shapes and dtypes.

    dtype: as if all numbers were in it, one tensor after another. Where `fingerprint` sees a fine-tuned copy, this sees one
    altered number. Takes a second or less for a gigabyte.
    """
    states = (bare_names(one.state_dict()) for one in modules)
    return checksum_of(*({name: value.detach for name, value in state.items()} for state in states), dtype=dtype)


def checksum_of(*states: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype | None = None) -> str:
    """The `checksum` of modules with these states, each tensor made only when it is hashed."""

    def line(named: tuple[str, Callable[[], Tensor]]) -> str:
        name, value = named[0], named[1]()
        value = value if dtype is None or not value.is_floating_point() else value.to(dtype)
        return f"{name} {tuple(value.shape)} {value.dtype} {_content(value)}"

    tensors = [(f"{i}.{name}", make) for i, one in enumerate(states) for name, make in sorted(one.items())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter's lock
        return digest(*pool.map(line, tensors))


def _content(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def identity(model: Model) -> dict[str, Any]:
    """What a store's encodings depend on in a freshly loaded model, as in fp32: VAE, text encoders and tokenizers."""
    return {
        "family": model.family.name,
        "vae": fingerprint(model.vae),
        "text_encoders": [fingerprint(encoder) for encoder in model.text_encoders],
        "tokenizers": [tokenizer_digest(one, one.model_max_length) for one in model.tokenizers],
        **({} if model.text_tokens is None else {"text_tokens": model.text_tokens}),
    }


def encoders(model: Model) -> dict[str, str]:
    """What a store's encodings depend on to the last bit, beside `identity`; stores of earlier versions lack it."""
    return {"encoders": checksum(model.vae, *model.text_encoders, dtype=torch.float32)}

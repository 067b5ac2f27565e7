"""Tokenizing captions, shared by the families."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo.common.device import moved
from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.models.family import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

# What transformers 5 calls CLIPTokenizer too. The CLIPTokenizer of 4 gives captions in Japanese, Korean or Thai other
# tokens, and cannot read a tokenizer.json.
TOKENIZER = "CLIPTokenizerFast"
T5_TOKENIZER = "T5TokenizerFast"
QWEN_TOKENIZER = "Qwen2TokenizerFast"

# Before the names of an encoder's weights in published files and in transformers 4. In transformers 5 CLIPTextModel is
# without: it reads both, and writes files that 4 would not find a weight in.
PREFIX = "text_model."
KEY_MAPPING = {
    r"^(embeddings|encoder|final_layer_norm)\.": rf"{PREFIX}\1."
}  # for `from_pretrained`: reads both in 4 too


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text encoder, named as in published files, which every transformers reads."""
    bare = not any(name.startswith(PREFIX) for name in state)
    return {PREFIX * bare + name: value for name, value in state.items()}


def bare_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of any module, where it is a CLIPTextModel named as transformers 5 does; others as they are."""
    whole = all(name.startswith(PREFIX) for name in state)
    return {name.removeprefix(PREFIX) if whole else name: value for name, value in state.items()}


def read_tokenizer(folder: Path, kind: str = TOKENIZER) -> Any:
    """The tokenizer in a folder, of a class of transformers. Raises what transformers raises."""
    import transformers

    return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)


def same_tokens(tokenizer: Any) -> CLIPTokenizer:
    """What a pipeline of diffusers has as its tokenizer, as `read_tokenizer` reads it."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return read_tokenizer(Path(folder))


def token_ids(
    tokenizer: CLIPTokenizer, encoder: TextEncoder | CLIPTextModel, captions: list[str], length: int | None = None
) -> Tensor:
    """Captions, padded and cut to `length` tokens (None: the encoder's): [B, S] int64 on the encoder's device."""
    if length is None:
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return beside(encoder, _tokenized(tokenizer, captions, length).input_ids)


def tokens_and_mask(
    tokenizer: CLIPTokenizer, encoder: TextEncoder, captions: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """`token_ids`, and [B, S] int64 with 1 where a token is the caption's and 0 where it is padding."""
    found = _tokenized(tokenizer, captions, length)
    return beside(encoder, found.input_ids), beside(encoder, found.attention_mask)


def _tokenized(tokenizer: CLIPTokenizer, captions: list[str], length: int) -> Any:
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def beside(encoder: TextEncoder | CLIPTextModel, tokens: Tensor) -> Tensor:
    """`tokens` on the encoder's device."""
    device = next(encoder.parameters()).device
    # From memory that is not page-locked the copy would wait until the GPU has done all that it was given before.
    return moved(tokens.pin_memory() if device.type == "cuda" else tokens, device)


def chat(tokenizer: Any, captions: list[str]) -> list[str]:
    """Each caption as what a user says, in the tokenizer's own chat template, up to where an answer begins.

    The answer begins without thinking, in templates that know of it. Raises UserError for a tokenizer without a template.
    """
    turns = [[{"role": "user", "content": caption}] for caption in captions]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # there is none, or jinja cannot make sense of it, which comes as many kinds
        raise UserError(
            f"the tokenizer's chat template cannot be used ({first_line(error)}): fetch the model again"
        ) from error


@torch.no_grad()
def run_encoder(
    tokenizer: CLIPTokenizer, encoder: TextEncoder, captions: list[str], length: int | None = None, **options: Any
) -> Any:
    """The output of a transformers text encoder for B captions of `length` tokens; `options` go to its forward."""
    with _default(torch.float64) if encoder.dtype == torch.float64 else nullcontext():
        return encoder(token_ids(tokenizer, encoder, captions, length), **options)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype inside the block: transformers 4 fills CLIP's mask in it with the least float64 that there is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

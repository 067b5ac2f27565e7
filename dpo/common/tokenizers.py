"""Tokenizers as content: equal digests for equal words and equal cutting."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dpo.common.words import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("", "a photograph of a red fox, 35 mm", "Ünïcode — 狐 🦊 \n\t tab", "word " * 100)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    """A hash, hexadecimal, of a tokenizer's vocabulary and of what it makes of some texts, cut or padded to `length` tokens."""
    ids = tokenizer(list(PROBES), padding="max_length", truncation=True, max_length=length).input_ids
    return digest(json.dumps(sorted(tokenizer.get_vocab().items())), json.dumps(ids))

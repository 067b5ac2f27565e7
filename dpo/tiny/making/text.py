"""The captions' side: a CLIP tokenizer with a vocabulary of its own, and a small CLIP text encoder."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpo.tiny.making.scenes import PHRASES, caption
from dpo.tiny.making.sprites import ICONS
from dpo.tiny.world import COLOURS

LENGTH = 16  # tokens of a caption
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair encoding learnt from every caption that a world can have (of all 40 objects), written to `folder`.

    There are so few words that the last merges make each of them one token.
    """
    captions = [caption(*parts) for parts in product(ICONS, COLOURS, range(len(PHRASES)))]
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    learnt.pre_tokenizer = pre_tokenizers.Sequence(split)
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [byte + "</w>" for byte in bytes_]
    words = [text.replace(",", " ,") for text in captions]
    # Pairs of equal frequency are merged in the order of their ids. All bytes get fixed ids first, so that every
    # build learns the same vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=4000, end_of_word_suffix="</w>", special_tokens=ends, initial_alphabet=bytes_, show_progress=False
    )
    learnt.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    tokens = bytes_ + ends + ["".join(pair) for pair in merges] + [START, END]
    write_vocabulary({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges, folder)
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, pad_token=END)


def write_vocabulary(vocabulary: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> None:
    """The two files that every version of CLIPTokenizer reads (newer ones write tokenizer.json alone)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A new encoder of two layers for this vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

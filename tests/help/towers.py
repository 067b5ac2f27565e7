"""Tiny CLIP models with random weights, saved as published ones are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from dpo.tiny.paths import pipeline_path

SIDE = 28
TOKENIZER = pipeline_path() / "tokenizer"
WORDS = 1 + max(json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8")).values())


def save_tiny_clip(folder: Path, *, seed: int = 0) -> CLIPModel:
    """A CLIP of two layers with the embedded world's words, saved in `folder`; its config names a wrong end, 2, as published files do."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config={**sizes, "vocab_size": WORDS, "max_position_embeddings": 77, "eos_token_id": 2},
            vision_config={**sizes, "image_size": SIDE, "patch_size": 7},
            projection_dim=16,
        )
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim else parameter.data.fill_(3.0)
    save_clip(model, folder)
    return model


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Saves a model of WORDS words in `folder`, with the embedded world's tokenizer."""
    model.save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)


def swap_two_words(folder: Path) -> None:
    """Gives two words of a saved tokenizer each other's numbers, in place."""
    swapped = 0
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text("utf-8"))
        words = content.get("model", content).get("vocab", content)
        if "a</w>" in words and "b</w>" in words:
            words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]
            file.write_text(json.dumps(content), "utf-8")
            swapped += 1
    assert swapped, "no file there has words"

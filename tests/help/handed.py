"""What is handed on: the folder of a LoRA run without its training, and tensors of files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from dpo.models import lora
from dpo.models.adapter import Adapter
from dpo.models.load import load
from dpo.settings.config import Config, change, to_toml

TARGETS = ("to_out.0", "conv1")


def lora_run(folder: Path, base: str, *, rank: int = 3, alpha: float = 4.0) -> Adapter:
    """Writes what a LoRA run leaves: its config.toml and the adapter, with random factors; the adapter."""
    model = load(base)
    layers = lora.add(model.denoiser, rank=rank, alpha=alpha, target_modules=TARGETS, dropout=0.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        up = layer.get_submodule("lora_B").get_parameter("default.weight")
        up.data = torch.randn(up.shape, generator=generator) * 0.05
    folder.mkdir(parents=True)
    lora.save(model.denoiser, model.family, folder)
    config = change(Config(), model=base, data="/home/me/my pairs", lora=True, rank=rank, output=str(folder))
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return lora.adapter_of(model.denoiser)


def header(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()

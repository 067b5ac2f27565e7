"""LAION's aesthetic predictors: a linear head on the unit vector of an image by OpenAI's CLIP ViT-L-14; captions play no part.

Version 1 is one layer; version 2 ("sac+logos+ava1-l14-linearMSE") five layers without activations between, with the
sizes and names of ImageReward's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.scorers.clip import L14
from dpo.scorers.imagereward import Head
from dpo.scorers.published import converted, fill, header, read
from dpo.scorers.towers import Towers, fetched, loaded, words_of

SOURCES = {
    "aesthetic-v1": "https://github.com/LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth",
    "aesthetic-v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth",
}
FIRST = {"aesthetic-v1": "weight", "aesthetic-v2": "layers.0.weight"}  # [outputs, width of the vectors]


@dataclass(frozen=True)
class Aesthetic:
    """The scorer; about 1 to 10, higher is better."""

    name: str
    towers: Towers
    head: nn.Module  # [N, D] -> [N] or [N, 1]
    fingerprint: str

    @torch.inference_mode()
    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float32 on the CPU. Raises ValueError unless there is a caption for each image."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, {len(captions)} captions")
        return self.head(self.towers.images(images)).flatten()


def checked(name: str, place: str | None) -> Path:
    """The converted file at `place`, whose header says that it holds the head of scorer `name`. Raises UserError."""
    path, first = converted(name, SOURCES[name], place), FIRST[name]
    if len(header(path).shapes.get(first, ())) != 2:
        raise UserError(f"{path} does not hold the weights of {name} (no {first}); convert {SOURCES[name]}")
    return path


def beside(name: str, path: Path, cache_dir: str | Path | None) -> None:
    """Fetches the CLIP model and its tokenizer unless they lie beside the converted file. Raises UserError."""
    words_of(name, fetched(name, _clip(path), cache_dir), L14, cache_dir)


def _clip(path: Path) -> str:
    """Where the CLIP model is: beside the converted file, or on the hub."""
    return str(path.parent) if (path.parent / "config.json").is_file() else L14


def _opened(
    name: str,
    *,
    place: str | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> Aesthetic:
    path = checked(name, place)
    state = read(path)
    width = state[FIRST[name]].shape[1]
    towers = loaded(name, L14, preprocessing="crop", place=_clip(path), device=device, dtype=dtype, cache_dir=cache_dir)
    if width != len(towers.model.visual_projection.weight):
        raise UserError(
            f"{path} is of vectors {width} wide, and {L14} has {len(towers.model.visual_projection.weight)}; convert {SOURCES[name]}"
        )
    with torch.device("meta"):
        head: nn.Module = nn.Linear(width, 1) if name == "aesthetic-v1" else Head(width)
    fill(head, {key: value.float() for key, value in state.items()}, path)
    return Aesthetic(name, towers, head.eval(), f"{name} {checksum(path)} {towers.fingerprint}")


def aesthetic_v1(**options: Any) -> Aesthetic:
    """Version 1 from converted weights, whose folder may hold the CLIP model too. Raises UserError where one is not to be had."""
    return _opened("aesthetic-v1", **options)


def aesthetic_v2(**options: Any) -> Aesthetic:
    """Version 2, as `aesthetic_v1`."""
    return _opened("aesthetic-v2", **options)

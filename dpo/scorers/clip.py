"""CLIP score: the bare cosine of image and caption. Weights and preprocessing belong to the name; names do not compare."""

from __future__ import annotations

import torch

from dpo.scorers.towers import Cosine, loaded

L14, H14 = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VARIANTS = {  # name: weights, preprocessing
    "clip-l14": (L14, "crop"),
    "clip-h14": (H14, "crop"),
    "clip-h14-pad": (H14, "pad"),
}


def _opened(
    name: str, place: str | None, device: torch.device | str, dtype: torch.dtype, cache_dir: str | None
) -> Cosine:
    source, preprocessing = VARIANTS[name]
    towers = loaded(
        name, source, preprocessing=preprocessing, place=place, device=device, dtype=dtype, cache_dir=cache_dir
    )
    return Cosine(name, towers, 1.0)


def clip_l14(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_dir: str | None = None
) -> Cosine:
    """OpenAI's ViT-L-14, cropped. Raises UserError where its weights are not to be had."""
    return _opened("clip-l14", place, device, dtype, cache_dir)


def clip_h14(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_dir: str | None = None
) -> Cosine:
    """LAION-2B's ViT-H-14, cropped. Raises UserError where its weights are not to be had."""
    return _opened("clip-h14", place, device, dtype, cache_dir)


def clip_h14_pad(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_dir: str | None = None
) -> Cosine:
    """LAION-2B's ViT-H-14, padded to a square as Diffusion-DPO's own table has it. Raises UserError as `clip_h14`."""
    return _opened("clip-h14-pad", place, device, dtype, cache_dir)

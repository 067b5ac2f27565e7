"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP ViT-H-14 trained on Pick-a-Pic; exp(logit_scale) times the cosine."""

from __future__ import annotations

import torch

from dpo.scorers.towers import Cosine, loaded

SOURCE = "yuvalkirstain/PickScore_v1"
WORDS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def pickscore(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_dir: str | None = None
) -> Cosine:
    """PickScore on the scale of the papers, about 17 to 24. Raises UserError where its weights are not to be had."""
    towers = loaded(
        "pickscore", SOURCE, words=WORDS, preprocessing="crop",
        place=place, device=device, dtype=dtype, cache_dir=cache_dir,
    )  # fmt: skip
    return Cosine("pickscore", towers, towers.scale, temperature=1.0)  # it was trained as the softmax of these scores

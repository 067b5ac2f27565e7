"""Diversity: how far apart the images of one prompt lie, by the cosine of an image tower's embeddings.

Alignment may raise every scorer and make all images of a prompt alike; this is the number that then falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.scorers.compare import Interval, mean_interval
from dpo.scorers.towers import loaded

SOURCE = "openai/clip-vit-large-patch14"


def distances(features: Tensor, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of 1 - cosine over the pairs of images of each prompt, from embeddings [N, D] and prompts, int [N].

    Gives the prompts that have two images or more, ascending [P], and their distances [P], 0..2.
    """
    units = torch.nn.functional.normalize(features.double(), dim=-1)
    kept, found = [], []
    for prompt in np.unique(prompts):
        of = units[torch.from_numpy(np.flatnonzero(prompts == prompt))]
        if len(of) > 1:
            first, second = torch.triu_indices(len(of), len(of), offset=1)
            kept.append(prompt)
            found.append(float((1 - (of[first] * of[second]).sum(-1)).mean()))
    return np.array(kept), np.array(found)


@dataclass(frozen=True)
class Diversity:
    """A set scorer over the embeddings that `embed` makes: images -> [N, D], in any scale."""

    embed: Callable[[Sequence[Image.Image]], Tensor]
    fingerprint: str
    name: str = "diversity"

    def features(self, *, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU."""
        return self.embed(images).float().cpu()

    def by_prompt(self, features: Tensor, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`distances`."""
        return distances(features, prompts)

    def score(self, features: Tensor, prompts: np.ndarray) -> tuple[float, Interval | None]:
        """Mean distance over prompts and its 95 % interval over prompts, None below five.

        Raises UserError where no prompt has two images.
        """
        _, found = distances(features, prompts)
        if not len(found):
            raise UserError(f"{self.name} compares the images of a prompt: draw two seeds or more of each (--seeds 2)")
        return float(found.mean()), mean_interval(found)


def opened(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_dir: str | None = None
) -> Diversity:
    """`diversity` by OpenAI's CLIP ViT-L-14, cropped. Raises UserError where its weights are not to be had."""
    towers = loaded(
        "diversity", SOURCE, preprocessing="crop", place=place, device=device, dtype=dtype, cache_dir=cache_dir
    )
    return Diversity(towers.images, f"diversity {towers.fingerprint}")

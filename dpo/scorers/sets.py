"""The second kind of scorer: one number for a whole set of images, from features that are computed once an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from dpo.scorers.compare import Interval


class SetScorer(Protocol):
    """`features` may be cached by (image, fingerprint): no feature depends on the other images."""

    name: str
    fingerprint: str  # of weights (full content), preprocessing and dtype

    def features(self, *, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU."""
        ...

    def score(self, features: Tensor, prompts: np.ndarray) -> tuple[float, Interval | None]:
        """The number of a set, from its features [N, D] and the prompt of each image, int [N]; with its 95 % interval.

        Raises UserError for too few images.
        """
        ...

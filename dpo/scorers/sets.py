"""The second kind of scorer: one number for a whole set of images, from features that are computed once an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from dpo.scorers.compare import Interval


@runtime_checkable
class SetScorer(Protocol):
    """`features` may be cached by (image, fingerprint): no feature depends on the other images or on a caption."""

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


@runtime_checkable
class OverPrompts(SetScorer, Protocol):
    """One whose number is a mean over prompts: two sets are then compared prompt by prompt, which shows more."""

    def by_prompt(self, features: Tensor, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompts that have a number, ascending int [P], and their numbers, float64 [P]. Arguments as of `score`."""
        ...

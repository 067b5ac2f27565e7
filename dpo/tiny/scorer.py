"""The embedded world's judges as scorers: its tastes, whether a picture shows what its caption says, diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.scorers.diversity import Diversity
from dpo.tiny import detail
from dpo.tiny.judge import Judge, load_judge, score
from dpo.tiny.paths import ASSETS
from dpo.tiny.world import SLOPE

SIDE = 64  # pixels that a judge sees


@dataclass(frozen=True)
class OfJudge:
    """A judge of the embedded world, which looks at pictures of 64 x 64 pixels."""

    name: str
    fingerprint: str
    judge: Judge
    faithful: bool  # whether it asks for object and colour, instead of the taste
    size = (SIDE, SIDE)  # of the pictures that it can judge

    @property
    def temperature(self) -> float | None:
        """Of the taste the slope of the noisy rater who labelled the world's pairs; faithfulness, 0 or 1, has none."""
        return None if self.faithful else SLOPE

    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float32: the taste's score, 0 to 3; or 1 where object and colour are the caption's, else 0.

        Raises UserError for images of another size.
        """
        seen = self.judge.read(_pixels(self.name, images))
        found = self.judge.faithful(seen, list(captions)) if self.faithful else score(seen)
        return torch.from_numpy(np.asarray(found, dtype=np.float32))


@dataclass(frozen=True)
class OfDetail:
    """A taste for fine detail, which looks at pictures of any size."""

    name: str
    fingerprint: str
    taste: Callable[[Image.Image], float]
    temperature: float | None  # of the noisy rater who labelled by it

    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float32: a logarithm, higher with more detail."""
        return torch.tensor([self.taste(image) for image in images], dtype=torch.float32)


def _pixels(name: str, images: Sequence[Image.Image]) -> np.ndarray:
    """uint8 [N, 64, 64, 3]. Raises UserError for images of another size."""
    if other := next((image.size for image in images if image.size != (SIDE, SIDE)), None):
        raise UserError(f"{name} judges images of {SIDE} x {SIDE} pixels, not {other[0]} x {other[1]}")
    return np.stack([np.asarray(image) for image in images])


def _fingerprint(name: str, judge: str) -> str:
    return f"{name} {checksum(ASSETS / 'judges' / f'{judge}.safetensors')[:32]} float32"


def _opened(judge: str, faithful: bool) -> OfJudge:
    name = f"tiny-{judge}" + ("-faithful" if faithful else "")
    return OfJudge(name, _fingerprint(name, judge), load_judge(judge), faithful)


def judge_a(**unused: Any) -> OfJudge:
    """Judge a, which labelled the embedded pairs."""
    return _opened("a", False)


def judge_b(**unused: Any) -> OfJudge:
    """Judge b, which labelled nothing."""
    return _opened("b", False)


def faithful_b(**unused: Any) -> OfJudge:
    """Whether judge b sees the object and the colour that the caption names."""
    return _opened("b", True)


def diversity_b(**unused: Any) -> Diversity:
    """How far apart the pictures of a caption lie in what judge b reads their traits from."""
    name, judge = "tiny-diversity", load_judge("b")
    return Diversity(lambda images: judge.features(_pixels(name, images)), _fingerprint(name, "b"), name)


def detail_a(**unused: Any) -> OfDetail:
    """The second taste, which labelled the pairs of python -m dpo.tiny.build --detail."""
    return OfDetail("tiny-detail-a", f"tiny-detail-a blur {detail.RADIUS}", detail.taste_a, detail.SLOPE)


def detail_b(**unused: Any) -> OfDetail:
    """Another measure of detail, which labelled nothing."""
    return OfDetail("tiny-detail-b", f"tiny-detail-b percentile {detail.STEEPEST} over deviation", detail.taste_b, None)

"""A user's own scorer: its answers as tensors, whatever they came as, and its errors as one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import excerpt, first_line
from dpo.scorers.compare import Interval

NEEDED = ("name", "fingerprint", "score")
PROBE = 64  # pixels of the side of an image to try a scorer with, where it names no size
T = TypeVar("T")


class Own:
    """A scorer of images (dpo.scorers.scorer.Scorer). Raises UserError for what its own code raises."""

    def __init__(self, asked: str, made: Any) -> None:
        self._asked, self._made = asked, made
        self.name, self.fingerprint = str(made.name), str(made.fingerprint)
        self.size = self._size_of(getattr(made, "size", None))
        self.temperature = getattr(made, "temperature", None)

    def _size_of(self, value: Any) -> tuple[int, int] | None:
        try:
            size = None if value is None else tuple(index(side) for side in value)
        except TypeError:
            size = ()
        if size is None:
            return None
        if len(size) != 2 or min(size) < 1:
            raise UserError(
                f"--scorers {self._asked}: its size is {excerpt(value)}; two whole numbers above 0 are needed, width and height"
            )
        return size[0], size[1]

    def _said(self, what: str, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's own code
            raise UserError(
                f"--scorers {self._asked}: its {what} fails ({type(error).__name__}: {first_line(error)}); mend it"
            ) from error

    def _numbers(self, what: str, value: Any) -> Tensor:
        """Whatever holds numbers, as float64 on the CPU."""
        try:
            if isinstance(value, Tensor):
                return value.detach().double().cpu()
            return torch.from_numpy(np.array(value, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise UserError(f"--scorers {self._asked}: its {what} gives {excerpt(value)}, not numbers") from error

    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float64: a tensor, an array or a list of the scorer's."""
        value = self._said("score", lambda: self._made.score(images=images, captions=captions))
        return self._numbers("score", value)


class OwnOfSet(Own):
    """One of a whole set (dpo.scorers.sets.SetScorer)."""

    def features(self, *, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float64."""
        value = self._said("features", lambda: self._made.features(images=images))
        return self._numbers("features", value)

    def score(self, features: Tensor, prompts: np.ndarray) -> tuple[float, Interval | None]:  # type: ignore[override]
        """The number of a set, and its interval where the scorer gives one."""
        value = self._said("score", lambda: self._made.score(features, prompts))
        number, interval = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        found = self._numbers("score", number)
        if found.numel() != 1:
            raise UserError(f"--scorers {self._asked}: its score gives {excerpt(value)}, not one number for all images")
        if interval is None:
            return float(found), None
        ends = self._numbers("score", interval)
        if ends.shape != (2,):
            raise UserError(
                f"--scorers {self._asked}: its score gives the interval {excerpt(interval)}, not its two ends"
            )
        return float(found), (float(ends[0]), float(ends[1]))


class OwnOverPrompts(OwnOfSet):
    """One of a whole set that is a mean over prompts (dpo.scorers.sets.OverPrompts)."""

    def by_prompt(self, features: Tensor, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompts that have a number, and their numbers."""
        value = self._said("by_prompt", lambda: self._made.by_prompt(features, prompts))
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise UserError(
                f"--scorers {self._asked}: its by_prompt gives {excerpt(value)}, not the prompts and the number of each"
            )
        of, numbers = (self._numbers("by_prompt", one).numpy() for one in value)
        if of.shape != numbers.shape or of.ndim != 1 or not np.isin(of, prompts).all():
            raise UserError(
                f"--scorers {self._asked}: its by_prompt gives prompts of shape {of.shape} and numbers of shape {numbers.shape}; a "
                "number for each of some of the prompts is needed"
            )
        return of.astype(np.int64), numbers


def adopted(asked: str, found: Any) -> Own:
    """The scorer that `found`, an object or what makes one, is. Raises UserError where it is none."""
    try:
        made = found() if isinstance(found, type) or (callable(found) and not hasattr(found, "fingerprint")) else found
    except Exception as error:  # the user's own code
        raise UserError(f"--scorers {asked}: cannot be made ({first_line(error)})") from error
    missing = [part for part in NEEDED if not hasattr(made, part)]
    if missing:
        raise UserError(f"--scorers {asked}: it has no {', '.join(missing)}; a scorer needs {', '.join(NEEDED)}")
    kind = Own if not hasattr(made, "features") else OwnOverPrompts if hasattr(made, "by_prompt") else OwnOfSet
    return kind(asked, made)


def tried(scorer: Own) -> None:
    """Asks a scorer for two images once. Raises UserError where it does not answer as one must."""
    size = scorer.size or (PROBE, PROBE)
    images = [Image.new("RGB", size, colour) for colour in ("firebrick", "steelblue")]
    if isinstance(scorer, OwnOfSet):
        shape, wanted = tuple(scorer.features(images=images).shape), "a row of numbers for each image"
        right = len(shape) == 2 and shape[0] == len(images)
    else:
        found = scorer.score(images=images, captions=["a red square", "a blue square"])
        shape, wanted = tuple(found.shape), "one number for each image"
        right = shape == (len(images),)
    if not right:
        raise UserError(f"{scorer.name} gives numbers of shape {shape} for {len(images)} images: {wanted} is needed")

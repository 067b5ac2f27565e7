"""What is scored: images with their captions, two of each pair of a set, or those that models drew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import digest
from dpo.data.contents import stamp_of, stamps
from dpo.data.pairs import ImageRef, Source, of_two
from dpo.evaluating.sides import Side


class Item(NamedTuple):
    """An image and its caption; the model that drew it, where that is known."""

    caption: str
    image: ImageRef
    model: str = ""


class Items(Protocol):
    """M images with random access, safe to use from several threads."""

    @property
    def fingerprint(self) -> str:
        """A hash of what is there, whatever folder it lies in: files by their sizes and some contents."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class OfPairs:
    """The images of a set of pairs: 2 r and 2 r + 1 are the first and second of row r."""

    source: Source  # every row as it stands

    @property
    def fingerprint(self) -> str:
        return digest(self.source.fingerprint, stamps(self.source).get("images", ""))

    def __len__(self) -> int:
        return 2 * len(self.source)

    def __getitem__(self, index: int) -> Item:
        pair = self.source[index // 2]
        return Item(pair.caption, of_two(pair)[index % 2])


@dataclass(frozen=True)
class OfSides:
    """Images of several models or folders, side by side."""

    sides: Sequence[Side]
    starts: np.ndarray = field(init=False)  # [sides + 1] int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", np.cumsum([0, *(len(side.images) for side in self.sides)]))

    @property
    def fingerprint(self) -> str:
        rows = (f"{side.name}\0{one.prompt}\0{one.seed}\0{one.path.name}" for side in self.sides for one in side.images)
        paths = [one.path for side in self.sides for one in side.images]
        if gone := next((path for path in paths if not path.exists()), None):
            raise UserError(f"{gone} cannot be read (it is gone): draw it again, or leave it out")
        files = stamp_of([ImageRef(path.name, path=str(path)) for path in paths])
        return digest(*rows, *(str(side.protocol) for side in self.sides), files)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Item:
        side = int(np.searchsorted(self.starts, index, side="right")) - 1
        shown = self.sides[side].images[index - int(self.starts[side])]
        return Item(shown.prompt, ImageRef(shown.path.name, path=str(shown.path)), self.sides[side].name)

    def prompts(self) -> tuple[list[str], np.ndarray]:
        """The prompts in order of their first image, and the prompt of each image, int64 [M]."""
        numbers: dict[str, int] = {}
        found = [numbers.setdefault(one.prompt, len(numbers)) for side in self.sides for one in side.images]
        return list(numbers), np.array(found, dtype=np.int64)


def content(data: bytes) -> str:
    """A hash of a file's content, hexadecimal: the name of an image that has no other."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()

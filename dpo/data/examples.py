"""Pairs to look at, as a run would read them: what `dpo.open_pairs` returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from PIL import Image

from dpo.common.errors import UserError
from dpo.data.images import decode, unreadable
from dpo.data.pairs import BadImage, ImageRef, Source, check_pairs, of_two
from dpo.data.sources import describe, open_source
from dpo.data.store.store import of_store
from dpo.settings.config import Config, Data, change
from dpo.settings.fields import nearest


class Example(NamedTuple):
    """A pair: upright RGB images of their own size, not cut to a square, and the probability that `chosen` is preferred."""

    prompt: str
    chosen: Image.Image
    rejected: Image.Image
    p: float  # in [0.5, 1]


@dataclass(frozen=True)
class Examples:
    """The pairs of a set in its own order; an image is read when its pair is asked for."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Pair `index`, from the end where it is negative. Raises IndexError, and UserError for an unreadable image."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        pair = self.source[place]
        chosen, rejected = (_image(image, pair.caption) for image in of_two(pair))
        return Example(pair.caption, chosen, rejected, pair.prob)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        """What was found and what was left out, as the log of a run says it."""
        return f"Examples({describe(self.source)})"


def _image(ref: ImageRef, caption: str) -> Image.Image:
    """The image, decoded. Raises UserError."""
    try:
        return decode(ref.load())
    except BadImage as error:
        raise UserError(f"{unreadable(ref, caption, error)}; mend it or leave the pair out") from error


def open_pairs(data: str | os.PathLike[str], **settings: Any) -> Examples:
    """The pairs that `data` names: whatever --data takes but a prepared store, which keeps no images.

    settings: how they are read, by the names of the group `data` (split, ties, caption_column, max_pairs, ...). Raises
    UserError where there is no such set, it cannot be read, or no pair is usable.
    """
    names = [field.name for field in fields(Data)]
    for name in settings:
        if name not in names:
            like = nearest(name, names)
            raise UserError(
                f"open_pairs: {name} does not say how pairs are read" + (f"; did you mean {like}?" if like else "")
            )
    source = open_source(change(Config(), data=os.fspath(data), **settings).data)
    if of_store(source) is not None:
        raise UserError(
            f"{os.fspath(data)} is a prepared store, which keeps no images: open the pairs it was made from"
        )
    check_pairs(source, os.fspath(data), "open_pairs opens pairs")
    return Examples(source)

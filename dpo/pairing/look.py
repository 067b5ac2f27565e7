"""What is in the images of a set: sizes, broken ones, a small copy of each to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from dpo.common.console import Progress
from dpo.common.pictures import pixel_hash
from dpo.common.words import first_line
from dpo.data.images import decode
from dpo.data.order import epoch_order
from dpo.data.pairs import BadImage, ImageRef, Source, image_ref, things
from dpo.data.parquet import read_in_order

READERS, AT_ONCE = 2, 32  # threads that decode, and pairs that are in memory at once
UNITS = 20  # row groups of a large set that are read
SMALL = 16  # pixels of a side of the small copies
LINES = 8  # of progress, where there is no terminal


class Seen(NamedTuple):
    """An image as it was decoded, upright."""

    width: int
    height: int
    pixels: str  # a hash of them: the same picture, whatever its file is called
    small: np.ndarray  # [SMALL, SMALL, 3] uint8


class Broken(NamedTuple):
    """An image that cannot be used, and why."""

    why: str


class Looked(NamedTuple):
    """A pair and what is in its images, or an image without a partner."""

    place: int  # in its set
    key: int
    caption: str
    names: tuple[str, ...]  # uids of the chosen and of the rejected image, or of the one image
    win: Seen | Broken
    lose: Seen | Broken | None  # None: without a partner
    liked: bool = True  # the label of one without a partner

    @property
    def seen(self) -> tuple[Seen | Broken, ...]:
        """What is in each of its images."""
        return (self.win,) if self.lose is None else (self.win, self.lose)

    @property
    def sound(self) -> bool:
        """Whether all of them can be read."""
        return all(isinstance(one, Seen) for one in self.seen)


@dataclass
class Looker:
    """Looks at each image once, by its content. Safe to use from several threads."""

    known: dict[str, Seen | Broken] = field(default_factory=dict)

    def see(self, image: ImageRef) -> Seen | Broken:
        """What is in an image."""
        try:
            data = image.load()
        except BadImage as error:
            return Broken(first_line(error))
        name = image_ref(data, None, None).uid
        if name not in self.known:
            self.known[name] = _seen(data)
        return self.known[name]

    def all(self, images: Sequence[ImageRef]) -> Iterator[Seen | Broken]:
        """What is in each of the images, in their order; says how far it is."""
        with ThreadPoolExecutor(READERS) as pool, Progress(
            len(images), lambda _: ["looked at"], 0, max(1, len(images) // LINES), unit="image"
        ) as bar:  # fmt: skip
            done = 0
            for part in (images[i : i + AT_ONCE] for i in range(0, len(images), AT_ONCE)):
                yield from pool.map(self.see, part)
                done += len(part)
                bar.update(done, {})


def _seen(data: bytes) -> Seen | Broken:
    try:
        image = decode(data)
    except BadImage as error:
        return Broken(first_line(error))
    small = np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BOX), dtype=np.uint8)
    return Seen(image.width, image.height, pixel_hash(image), small)


def apart(a: Seen, b: Seen) -> float:
    """How far the small copies of two images are apart: root mean square, in levels of 255."""
    return float(np.sqrt(np.mean((a.small.astype(np.float64) - b.small) ** 2)))


def chosen(source: Source, most: int) -> np.ndarray:
    """The indices of at most `most` pairs, by key, in stored order: int64.

    Of a set that is read by row groups they come from UNITS of these: a row group is the least that can be read.
    """
    places = np.arange(len(source), dtype=np.int64)
    if len(source) <= most:
        return places
    if source.groups is not None and len(units := np.unique(source.groups)) > UNITS:
        places = np.flatnonzero(np.isin(source.groups, units[epoch_order(len(units), seed=0, epoch=0)[:UNITS]]))
    return np.sort(places[epoch_order(len(places), seed=0, epoch=0)[:most]])


def look(source: Source, indices: np.ndarray, looker: Looker) -> list[Looked]:
    """The pairs at `indices` [m] int64 of a set with what is in their images; a few pairs' files are in memory at once."""
    source, found = read_in_order(source), list[Looked]()
    with ThreadPoolExecutor(READERS) as pool, Progress(
        len(indices), lambda _: ["looked at"], 0, max(1, len(indices) // LINES), unit=things(source)[:-1]
    ) as bar:  # fmt: skip
        for part in (indices[i : i + AT_ONCE].tolist() for i in range(0, len(indices), AT_ONCE)):
            pairs = [source[place] for place in part]
            images = [image for pair in pairs for image in pair.images]
            seen = pool.map(looker.see, images)
            for place, pair in zip(part, pairs, strict=True):
                win, lose = next(seen), None if pair.lose is None else next(seen)
                names = tuple(image.uid for image in pair.images)
                found.append(Looked(place, pair.key, pair.caption, names, win, lose, pair.prob > 0.5))
            bar.update(len(found), {})
    return found

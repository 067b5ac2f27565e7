"""Aspect buckets: the few shapes of about one area to which images that are not square are cut, and the one of each pair.

The shapes have the area of the native square or a little less, so that none needs more memory, sides in steps, and an
aspect (width / height) of 1/2 to 2. Both images of a pair get one shape, as they share their noise: the nearest, by the
logarithm of the aspect, to the geometric mean of both images' aspects.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dpo.common.errors import UserError
from dpo.data.images import Size, upright_size
from dpo.data.pairs import ImageRef, Pair, Source
from dpo.data.store.store import of_store
from dpo.settings.config import Data

STEP = 64  # pixels, at 512 and above
STEPS = 8  # of the native square's side, below
WIDEST = 2  # aspect
AT_ONCE = 256  # pairs whose images' headers are read before the next ones: files may lie far away
READERS = 8  # threads
MANY = 10_000  # pairs, of which reading the headers takes a while

log = logging.getLogger("dpo")


@dataclass
class Cut:
    """How much of some images is cut away."""

    images: int = 0
    by_buckets: float = 0.0  # sum of the images' shares
    by_squares: float = 0.0

    def add(self, image: tuple[int, int], size: Size) -> None:
        """Counts an image of (width, height) that is cut to `size`."""
        self.images += 1
        self.by_buckets += cut_away(image, size)
        self.by_squares += cut_away(image, (1, 1))

    def told(self) -> str:
        """The shares in words."""
        found = (100 * share / max(1, self.images) for share in (self.by_buckets, self.by_squares))
        return "{:.1f} % of the images' area is cut away, {:.1f} % by squares".format(*found)


@dataclass(frozen=True, eq=False)  # arrays are neither equal nor not
class Buckets:
    """The shapes of a run, and which of them each pair of its source has."""

    sizes: tuple[Size, ...]
    of: np.ndarray  # [n] int64, a number in `sizes`
    cut: Cut | None = None  # None for a store, which has been cut

    def told(self) -> str:
        """How many pairs each shape has, in words."""
        counts = np.bincount(self.of, minlength=len(self.sizes)).tolist()
        used = [(count, size) for count, size in zip(counts, self.sizes, strict=True) if count]
        shapes = ", ".join(f"{wide} x {high} {count}" for count, (high, wide) in sorted(used, reverse=True))
        return f"buckets (width x height, pairs): {shapes}" + (f"; {self.cut.told()}" if self.cut else "")


def find(data: Data, factor: int, source: Source) -> Buckets | None:
    """The buckets of a source's pairs for the decided settings; None without --buckets.

    factor: what the model's sides must be a multiple of, in pixels. Reads the headers of all images, unless the pairs
    are in a store. Raises UserError where the resolution has no such buckets, or the store was made with others.
    """
    if not data.buckets:
        return None
    if (store := of_store(source)) is None:
        assert data.resolution is not None, "decided when the model was loaded"
        return measured(source, shapes(data.resolution, step_of(data.resolution, factor)), data.max_image_mib)
    inside = store.contents
    side = inside.settings["resolution"]  # a command that takes a store as it is has decided on the model's
    step = step_of(side, factor)
    if inside.settings["buckets"] != step:
        raise UserError(
            f"{inside.folder} has buckets in steps of {inside.settings['buckets']} pixels, this model needs {step}: "
            "prepare a store with this one"
        )
    assert inside.bucket is not None, "a store with buckets has those of its pairs"
    return Buckets(shapes(side, step), inside.bucket[store.pairs])


def step_of(resolution: int, factor: int) -> int:
    """The step of the sides: STEP, or an eighth of a smaller resolution, as a multiple of the model's factor.

    Raises UserError where the resolution is no multiple of it.
    """
    step = -(-min(STEP, resolution // STEPS) // factor) * factor
    if resolution % step:
        raise UserError(
            f"--buckets cuts sides in steps of {step} pixels: use --resolution {max(step, resolution // step * step)}"
        )
    return step


def shapes(resolution: int, step: int) -> tuple[Size, ...]:
    """(height, width) of each bucket, from the widest to the highest: the largest of each width within resolution^2."""
    wide = []
    for width in range(resolution, resolution * WIDEST, step):
        height = resolution**2 // width // step * step
        if not height or width > WIDEST * height:
            break
        wide.append((height, width))
    return (*reversed(wide), *((width, height) for height, width in wide[1:]))


def nearest(sizes: Sequence[Size], first: tuple[int, int] | None, second: tuple[int, int] | None) -> int:
    """The number of a pair's bucket, from (width, height) of both images; None: unreadable, then it is the square.

    Exact, in whole numbers: a pair just between two buckets gets the one nearer to the square.
    """
    middle = len(sizes) // 2
    if first is None or second is None:
        return middle
    aspect = Fraction(first[0] * second[0], first[1] * second[1])  # the square of the geometric mean
    at = middle
    while at and aspect > _between(sizes[at], sizes[at - 1]):
        at -= 1
    while at + 1 < len(sizes) and aspect < _between(sizes[at], sizes[at + 1]):
        at += 1
    return at


def _between(first: Size, second: Size) -> Fraction:
    """The aspect, squared, that is as far from one shape as from the other."""
    return Fraction(first[1] * second[1], first[0] * second[0])


def cut_away(image: tuple[int, int], size: Size) -> float:
    """The share of an image of (width, height) that is cut away where it is made to fill `size` (height, width)."""
    aspect = image[0] / image[1] * size[0] / size[1]
    return 1.0 - min(aspect, 1.0 / aspect)


def of_pair(sizes: Sequence[Size], pair: Pair, max_mib: int, cut: Cut | None = None) -> int:
    """The number of a pair's bucket, from the headers of its images, which are counted in `cut`."""
    return _of_images(sizes, _headers(pair.images, max_mib), cut)


def measured(source: Source, sizes: tuple[Size, ...], max_mib: int) -> Buckets:
    """The buckets of all pairs of a source, from the headers of their images."""
    if len(source) >= MANY:
        log.info("buckets: reading the headers of %d images", source.sides * len(source))
    numbers, cut = [], Cut()
    with ThreadPoolExecutor(READERS) as pool:
        for begin in range(0, len(source), AT_ONCE):
            pairs = [source[i] for i in range(begin, min(begin + AT_ONCE, len(source)))]
            for found in pool.map(lambda pair: _headers(pair.images, max_mib), pairs):
                numbers.append(_of_images(sizes, found, cut))
    return Buckets(sizes, np.array(numbers, dtype=np.int64), cut)


def _headers(images: Sequence[ImageRef], max_mib: int) -> list[tuple[int, int] | None]:
    return [upright_size(image, max_mib) for image in images]


def _of_images(sizes: Sequence[Size], found: Sequence[tuple[int, int] | None], cut: Cut | None) -> int:
    number = nearest(sizes, found[0], found[-1])  # of an image alone its own aspect
    for size in found:
        if size is not None and cut is not None:
            cut.add(size, sizes[number])
    return number

"""Whether the image files of a set are still those that they were: by size and time, then by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dpo.common.words import digest
from dpo.data.pairs import BadImage, ImageRef, Source

LOOKED_AT = 2**16  # pairs whose files are asked for size and time; of a larger set so many, evenly spread
AT_ONCE = 1024  # pairs whose images are in memory: 65,536, with what the threads keep of each, take 90 MB
READ = 64  # images whose content is hashed, evenly spread
THREADS = 16  # a network file system answers slowly, and many at once


def stamps(source: Source, was: Callable[[ImageRef], tuple[int, str] | None] = lambda image: None) -> dict[str, str]:
    """Two hashes of the image files of `source`: "image_times" of sizes and times, "images" of sizes and some contents.

    Files that were copied or touched have other times and the same contents. {} for pairs that lie in larger files (a
    parquet row group, a prepared store): those have their own identity. Reads at most 64 images. An image for which
    `was` knows a `state` counts with that one, whatever its file is now; several threads call it.
    """
    if source.groups is not None or not len(source):
        return {}
    looked_at = _spread(len(source), LOOKED_AT)
    sizes: list[str] = []
    times: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(looked_at), AT_ONCE):
            images = [image for i in looked_at[first : first + AT_ONCE] for image in source[int(i)].images]
            before = pool.map(was, images)
            for (size, when), old in zip(pool.map(_size_and_time, images), before, strict=True):
                sizes.append(str(size if old is None else old[0]))
                times.append(str(when))
        places = [divmod(int(i), source.sides) for i in _spread(len(sizes), READ)]
        read = [source[int(looked_at[pair])].images[side] for pair, side in places]
        known = list(pool.map(was, read))
        contents = list(pool.map(lambda one: _content(one[0]) if one[1] is None else one[1][1], zip(read, known)))
    return {
        "image_times": digest(digest(*sizes), *times),
        "images": digest(digest(*sizes), *contents),
    }


def stamp_of(images: Sequence[ImageRef]) -> str:
    """A hash of files in their order: of all sizes and of some contents. Times do not count: a copy is the same."""
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = [size for size, _ in pool.map(_size_and_time, images)]
        contents = list(pool.map(_content, [images[i] for i in _spread(len(images), READ)]))
    return digest(*map(str, sizes), *contents)


def state(image: ImageRef) -> tuple[int, str]:
    """(bytes, a hash of the content) of an image's file; -1 where there is none, "" where it cannot be read."""
    return _size_and_time(image)[0], _content(image)


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices below `count`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _size_and_time(image: ImageRef) -> tuple[int, int]:
    """(bytes, nanoseconds) of an image's file; -1 where there is none, no time for an image that is in memory."""
    if image.path is None:
        return (len(image.data) if image.data is not None else -1), 0
    try:
        status = os.stat(image.path)
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _content(image: ImageRef) -> str:
    """A hash of an image's bytes; "" for what is no file that can be read."""
    if image.path is not None and not Path(image.path).is_file():  # a pipe would never end
        return ""
    try:
        return hashlib.blake2b(image.load(), digest_size=16).hexdigest()
    except BadImage:
        return ""

"""Numbers for every image of a side: from a scorer, through a cache, or from a table that another program wrote."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.common.words import excerpt
from dpo.data.images import decode
from dpo.data.pairs import BadImage, ImageRef
from dpo.evaluating import tables
from dpo.evaluating.sides import Shown, Side
from dpo.scorers.cache import ScoreCache
from dpo.scorers.scorer import Scorer
from dpo.scorers.sets import SetScorer

log = logging.getLogger("dpo")

BATCH = 16  # images that a scorer sees at once
READERS = 2  # threads that decode images


@dataclass
class Look:
    """What was found in the images of a side; filled as they are read."""

    hashes: dict[Path, str] = field(default_factory=dict)
    unusable: dict[Path, str] = field(default_factory=dict)  # why
    flat: list[Path] = field(default_factory=list)  # of one colour: a model that failed, scored all the same


def read_image(path: Path) -> Image.Image:
    """An image as RGB. Raises UserError for a file that is none, is truncated or has too many pixels."""
    try:
        return decode(ImageRef(path.name, path=str(path)).load())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error


Said = Callable[[int, int], None]  # told how many images of all are done
Read = Callable[[Path], Image.Image]  # an image of a path; raises UserError
T = TypeVar("T")


def scores(
    side: Side,
    scorer: Scorer,
    cache: ScoreCache,
    look: Look,
    read: Read,
    said: Said = lambda done, total: None,
    batch: int = BATCH,
) -> np.ndarray:
    """The score [N] float64 of each image of a side; nan for one that cannot be read.

    What the cache has is not computed again, and an image whose hash is known from `look` is then not even read.
    """
    found = np.full(len(side.images), np.nan)

    def known(shown: Shown) -> float | None:
        return cache.get(look.hashes[shown.path], scorer.fingerprint, shown.prompt)

    def compute(places: list[int], images: list[Image.Image]) -> Sequence[float]:
        captions = [side.images[place].prompt for place in places]
        values = scorer.score(images=images, captions=captions).double().numpy()
        if values.shape != (len(places),):
            raise UserError(f"{scorer.name} gave {values.shape} scores for {len(places)} images: one each is needed")
        keys = [look.hashes[side.images[place].path] for place in places]
        finite = [row for row in zip(keys, captions, values.tolist(), strict=True) if math.isfinite(row[2])]
        cache.put(scorer.fingerprint, finite)
        return values.tolist()

    for place, value in _each(side, look, read, known, compute, said, batch):
        found[place] = value
    _say_missing(side, scorer.name, "score", np.isfinite(found), look)
    return found


def features(
    side: Side,
    scorer: SetScorer,
    cache: ScoreCache,
    look: Look,
    read: Read,
    said: Said = lambda done, total: None,
    batch: int = BATCH,
) -> np.ndarray:
    """The features [N, D] float32 of each image of a side; nan for one that cannot be read. As `scores` otherwise.

    D is 0 where none can be read. Equal images have equal features to the last bit, so that a set scores the
    same whatever it is called.
    """
    found = np.full((len(side.images), 0), np.nan, np.float32)
    first: dict[str, int] = {}  # the place of an image by its hash

    def known(shown: Shown) -> np.ndarray | None:
        return cache.get_features(look.hashes[shown.path], scorer.fingerprint)

    def compute(places: list[int], images: list[Image.Image]) -> Sequence[np.ndarray]:
        hashes = [look.hashes[side.images[place].path] for place in places]
        fresh = {key: image for key, image in zip(hashes, images, strict=True) if key not in first}
        rows: dict[str, np.ndarray] = {}
        if fresh:
            values = scorer.features(images=list(fresh.values())).float().numpy()
            if values.ndim != 2 or len(values) != len(fresh):
                raise UserError(
                    f"{scorer.name} gave {values.shape} features for {len(fresh)} images: a row each is needed"
                )
            rows = dict(zip(fresh, values, strict=True))
            cache.put_features(scorer.fingerprint, [row for row in rows.items() if np.isfinite(row[1]).all()])
        for key, place in zip(hashes, places, strict=True):
            first.setdefault(key, place)
        return [rows[key] if key in rows else found[first[key]] for key in hashes]

    for place, row in _each(side, look, read, known, compute, said, batch):
        if not found.shape[1]:
            found = np.full((len(side.images), len(row)), np.nan, np.float32)
        if len(row) != found.shape[1]:
            raise UserError(
                f"{scorer.name} gave features of {found.shape[1]} and of {len(row)} numbers: a scorer that changes needs "
                "another fingerprint"
            )
        found[place] = row
    _say_missing(side, scorer.name, "features", np.asarray(np.isfinite(found).all(1)), look)
    return found


def _say_missing(side: Side, scorer: str, what: str, finite: np.ndarray, look: Look) -> None:
    unusable = np.array([image.path in look.unusable for image in side.images])
    if bad := int((~finite & ~unusable).sum()):
        log.warning("%s gave no finite %s to %d images of %s: they are left out", scorer, what, bad, side.name)


def _each(
    side: Side,
    look: Look,
    read: Read,
    known: Callable[[Shown], T | None],
    compute: Callable[[list[int], list[Image.Image]], Sequence[T]],
    said: Said,
    batch: int,
) -> Iterator[tuple[int, T]]:
    """(place, value) of every image of a side that can be read: known, or computed `batch` images at a time."""
    waiting: list[tuple[int, Image.Image]] = []

    def computed() -> Iterator[tuple[int, T]]:
        places = [place for place, _ in waiting]
        values = compute(places, [image for _, image in waiting])
        waiting.clear()
        yield from zip(places, values, strict=True)

    for place, (value, image) in enumerate(_images(side, look, read, known)):
        if value is not None:
            yield place, value
        elif image is not None:
            waiting.append((place, image))
            if len(waiting) == batch:
                yield from computed()
        said(place + 1, len(side.images))
    if waiting:
        yield from computed()


def _images(
    side: Side, look: Look, read: Read, known: Callable[[Shown], T | None]
) -> Iterator[tuple[T | None, Image.Image | None]]:
    """For each image of a side what is known of it, else the image; neither for one that cannot be read."""

    def look_at(shown: Shown) -> tuple[T | None, Image.Image | None]:
        image = None
        if shown.path in look.unusable:
            return None, None
        if shown.path not in look.hashes:
            try:
                image = read(shown.path)
            except UserError as error:
                look.unusable[shown.path] = str(error)
                return None, None
            look.hashes[shown.path] = pixel_hash(image)
            if image.getcolors(1) is not None:
                look.flat.append(shown.path)
        value = known(shown)
        return value, None if value is not None else image or read(shown.path)

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(side.images), 4 * BATCH):  # so many are in memory at most
            yield from pool.map(look_at, side.images[start : start + 4 * BATCH])


def table_scores(side: Side, path: Path, look: Look) -> np.ndarray:
    """The score [N] of each image of a side from a table, nan where it has none.

    The table is CSV, TSV or JSON lines with a file (or the hash of an image) and a number in each row; GenEval's
    results.jsonl (filename, correct) is one. Files are compared by their path, or by its last parts. Raises UserError.
    """
    by_name: dict[str, float] = {}
    for number, row in tables.rows(path):
        name, value = tables.cell(row, (*tables.FILE, "hash")), tables.cell(row, tables.SCORE)
        if name is None or value is None:
            raise UserError(
                f"{path}, row {number}: needs a file ({', '.join(tables.FILE)}) and a number ({', '.join(tables.SCORE)})"
            )
        try:
            by_name[name] = float(value)
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {excerpt(value)} is not a number") from error
    found = np.array(
        [tables.of_file(image.path, by_name, math.nan, look.hashes.get(image.path)) for image in side.images]
    )
    if not np.isfinite(found).any():
        raise UserError(f"{path} has no score for any image of {side.name} in {side.place}")
    return found

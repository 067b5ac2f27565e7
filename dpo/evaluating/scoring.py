"""A number for every image of a side: from a scorer, through a cache, or from a table that another program wrote."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

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


def scores(
    side: Side,
    scorer: Scorer,
    cache: ScoreCache,
    look: Look,
    read: Callable[[Path], Image.Image],
    said: Callable[[int, int], None] = lambda done, total: None,
    batch: int = BATCH,
) -> np.ndarray:
    """The score [N] float64 of each image of a side; nan for one that cannot be read.

    read: gives the image of a path, or raises UserError. said: told how many of all are done. What the cache has is
    not computed again, and an image whose hash is known from `look` is then not even read.

    Rounding depends on what is scored together, so that each picture and caption is scored once: however often scoring
    was interrupted, the rest then comes in the same batches.
    """
    found = np.full(len(side.images), np.nan)
    waiting: dict[tuple[str, str], tuple[Image.Image, list[int]]] = {}  # (hash, caption) -> the image, and its places

    def compute() -> None:
        captions = [caption for _, caption in waiting]
        values = scorer.score(images=[image for image, _ in waiting.values()], captions=captions).double().numpy()
        if values.shape != (len(waiting),):
            raise UserError(f"{scorer.name} gave {values.shape} scores for {len(waiting)} images: one each is needed")
        for (_, places), value in zip(waiting.values(), values, strict=True):
            found[places] = value
        rows = [(key, caption, value) for (key, caption), value in zip(waiting, values.tolist(), strict=True)]
        cache.put(scorer.fingerprint, [row for row in rows if math.isfinite(row[2])])
        waiting.clear()

    for place, image in enumerate(_images(side, scorer, cache, look, read)):
        if isinstance(image, float):
            found[place] = image
        elif image is not None:
            shown = side.images[place]
            key = look.hashes[shown.path], shown.prompt
            if key in waiting:
                waiting[key][1].append(place)
            elif (known := cache.get(key[0], scorer.fingerprint, key[1])) is not None:  # scored since it was read
                found[place] = known
            else:
                waiting[key] = image, [place]
            if len(waiting) == batch:
                compute()
        said(place + 1, len(side.images))
    if waiting:
        compute()
    if bad := int((~np.isfinite(found)).sum()) - sum(image.path in look.unusable for image in side.images):
        log.warning("%s gave no finite score to %d images of %s: they are left out", scorer.name, bad, side.name)
    return found


def _images(
    side: Side, scorer: Scorer, cache: ScoreCache, look: Look, read: Callable[[Path], Image.Image]
) -> Iterator[Image.Image | float | None]:
    """For each image of a side: its score where the cache has it, else the image; None for one that cannot be read."""

    def look_at(shown: Shown) -> Image.Image | float | None:
        image = None
        if shown.path in look.unusable:
            return None
        if shown.path not in look.hashes:
            try:
                image = read(shown.path)
            except UserError as error:
                look.unusable[shown.path] = str(error)
                return None
            look.hashes[shown.path] = pixel_hash(image)
            if image.getcolors(1) is not None:
                look.flat.append(shown.path)
        known = cache.get(look.hashes[shown.path], scorer.fingerprint, shown.prompt)
        return known if known is not None else image or read(shown.path)

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

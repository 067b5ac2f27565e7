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
from dpo.common.words import excerpt, excerpt_of_path
from dpo.data.images import decode
from dpo.data.pairs import BadImage, ImageRef
from dpo.evaluating import tables
from dpo.evaluating.sides import Shown, Side
from dpo.scorers.cache import ScoreCache
from dpo.scorers.scorer import Scorer

log = logging.getLogger("dpo")

BATCH = 16  # images that a scorer sees at once
NARROW = 64  # times that the long side of an image may be the short one
READERS = 2  # threads that decode images


@dataclass
class Look:
    """What was found in the images of a side; filled as they are read."""

    hashes: dict[Path, str] = field(default_factory=dict)
    unusable: dict[Path, str] = field(default_factory=dict)  # why
    flat: list[Path] = field(default_factory=list)  # of one colour: a model that failed, scored all the same


def read_image(path: Path) -> Image.Image:
    """An image as RGB.

    Raises UserError for a file that is none, is truncated, has too many pixels, or is so narrow that a scorer, which
    brings its short side to a few hundred pixels, would make a huge one of it.
    """
    try:
        image = decode(ImageRef(path.name, path=str(path)).load())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
    if max(image.size) > NARROW * min(image.size):
        raise UserError(f"{path}: {image.width} x {image.height} pixels, one side over {NARROW} times the other")
    return image


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

    misfits: list[str] = []
    size: tuple[int, int] | None = getattr(scorer, "size", None)
    for place, image in enumerate(_images(side, scorer, cache, look, read)):
        if isinstance(image, float):
            found[place] = image
        elif image is not None and size is not None and image.size != size:
            misfits.append(f"{image.width} x {image.height}")
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
    if misfits:
        line = f"{scorer.name} judges images of {size[0]} x {size[1]} pixels, not {misfits[0]}"  # type: ignore[index]
        if len(misfits) == len(side.images):
            raise UserError(f"{line} as those of {side.name} are: name another scorer")
        log.warning("%s: %d of %d images of %s are left out", line, len(misfits), len(side.images), side.name)
    left_out = sum(image.path in look.unusable for image in side.images) + len(misfits)
    if bad := int((~np.isfinite(found)).sum()) - left_out:
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
        if shown.path not in look.hashes and (image := _seen(shown.path, look, read)) is None:
            return None
        known = cache.get(look.hashes[shown.path], scorer.fingerprint, shown.prompt)
        return known if known is not None else image or read(shown.path)

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(side.images), 4 * BATCH):  # so many are in memory at most
            yield from pool.map(look_at, side.images[start : start + 4 * BATCH])


def _seen(path: Path, look: Look, read: Callable[[Path], Image.Image]) -> Image.Image | None:
    """The image of a path, and what there is to know of it put into `look`; None for one that cannot be read."""
    try:
        image = read(path)
    except UserError as error:
        look.unusable[path] = str(error)
        return None
    look.hashes[path] = pixel_hash(image)
    if image.getcolors(1) is not None:
        look.flat.append(path)
    return image


def table_scores(side: Side, path: Path, look: Look, read: Callable[[Path], Image.Image] = read_image) -> np.ndarray:
    """The score [N] of each image of a side from a table, nan where it has none, which is said.

    The table is CSV, TSV or JSON lines with a file (or the hash of an image) and a number in each row; GenEval's
    results.jsonl (filename, correct) is one. Files are compared by their path, or by its last parts; an image is read
    only where a hash must tell. Raises UserError.
    """
    by_file: dict[str, tuple[int, float]] = {}  # the row, and its score
    by_hash: dict[str, tuple[int, float]] = {}
    for number, row in tables.rows(path):
        where = f"{path}, row {number}"
        file, key = tables.cell(row, tables.FILE, where), tables.cell(row, ("hash",), where)
        value = tables.cell(row, tables.SCORE, where)
        if (file is None and key is None) or value is None:
            raise UserError(
                f"{where}: needs a file ({', '.join(tables.FILE)}) and a number ({', '.join(tables.SCORE)})"
            )
        try:
            score = float(value)
        except ValueError as error:
            raise UserError(f"{where}: {excerpt(value)} is not a number") from error
        for name, known in ((file, by_file), (key and key.lower(), by_hash)):
            first, before = known.setdefault(name, (number, score)) if name else (number, score)
            if name and before != score and not math.isnan(before + score):
                if known is by_hash and file is not None:  # one picture of two prompts: its files tell them apart
                    by_hash[name] = (number, math.nan)
                    continue
                raise UserError(
                    f"{path}: rows {first} and {number} give {excerpt_of_path(name)} different scores, {before:g} and {score:g}"
                )
    rows = [tables.of_file(image.path, by_file, None) for image in side.images]
    for place, image in enumerate(side.images):
        if rows[place] is None and by_hash:
            if image.path not in look.hashes and image.path not in look.unusable:
                _seen(image.path, look, read)
            rows[place] = by_hash.get(look.hashes.get(image.path, ""))
    found = np.array([math.nan if row is None else row[1] for row in rows])
    finite = int(np.isfinite(found).sum())
    if not finite:
        raise UserError(f"{path} has no score for any image of {side.name} in {side.place}")
    if finite < len(found):
        log.warning(
            "%d of %d images of %s have no score in %s: left out", len(found) - finite, len(found), side.name, path
        )
    return found

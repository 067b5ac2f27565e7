"""A number for every image of a side: from a scorer, through a cache, or from a table that another program wrote."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.common.words import counted, excerpt, excerpt_of_path, number_of
from dpo.data.images import decode
from dpo.data.pairs import BadImage, ImageRef
from dpo.evaluating import tables
from dpo.evaluating.sides import Shown, Side
from dpo.scorers.cache import ScoreCache
from dpo.scorers.scorer import Scorer
from dpo.scorers.sets import SetScorer

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
    """An image as RGB. Raises UserError for a file that is none, or that `to_score` refuses."""
    try:
        return to_score(ImageRef(path.name, path=str(path)).load())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error


def to_score(data: bytes) -> Image.Image:
    """A file's bytes as an RGB image.

    Raises BadImage for what is no image, is truncated, has too many pixels, or is so narrow that a scorer, which
    brings its short side to a few hundred pixels, would make a huge one of it.
    """
    image = decode(data)
    if max(image.size) > NARROW * min(image.size):
        raise BadImage(f"{image.width} x {image.height} pixels, one side over {NARROW} times the other")
    return image


Said = Callable[[int, int], None]  # told how many images of all are done
Read = Callable[[Path], Image.Image]  # an image of a path; raises UserError
K = TypeVar("K", bound=Hashable)
T = TypeVar("T", float, np.ndarray)


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

    Rounding depends on what is scored together, so that each picture and caption is scored once: however often scoring
    was interrupted, the rest then comes in the same batches.
    """
    found = np.full(len(side.images), np.nan)

    def key(shown: Shown) -> tuple[str, str]:
        return look.hashes[shown.path], shown.prompt

    def known(key: tuple[str, str]) -> float | None:
        return cache.get(key[0], scorer.fingerprint, key[1])

    def compute(keys: list[tuple[str, str]], images: list[Image.Image]) -> Sequence[float]:
        values = scorer.score(images=images, captions=[caption for _, caption in keys]).double().numpy()
        if values.shape != (len(keys),):
            raise UserError(f"{scorer.name} gave {values.shape} scores for {len(keys)} images: one each is needed")
        rows = [(image, caption, value) for (image, caption), value in zip(keys, values.tolist(), strict=True)]
        cache.put(scorer.fingerprint, [row for row in rows if math.isfinite(row[2])])
        return values.tolist()

    for place, value in _each(side, scorer, look, read, key, known, compute, said, batch):
        found[place] = value
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

    def key(shown: Shown) -> str:
        return look.hashes[shown.path]

    def known(key: str) -> np.ndarray | None:
        return cache.get_features(key, scorer.fingerprint)

    def compute(keys: list[str], images: list[Image.Image]) -> Sequence[np.ndarray]:
        values = scorer.features(images=images).float().numpy()
        if values.ndim != 2 or len(values) != len(keys):
            raise UserError(f"{scorer.name} gave {values.shape} features for {len(keys)} images: a row each is needed")
        finite = [row for row in zip(keys, values, strict=True) if np.isfinite(row[1]).all()]
        cache.put_features(scorer.fingerprint, finite)
        return list(values)

    for place, row in _each(side, scorer, look, read, key, known, compute, said, batch):
        if not found.shape[1]:
            found = np.full((len(side.images), len(row)), np.nan, np.float32)
        if len(row) != found.shape[1]:
            raise UserError(
                f"{scorer.name} gave features of {found.shape[1]} and of {len(row)} numbers: a scorer that changes needs "
                "another fingerprint"
            )
        found[place] = row
    return found


def _each(
    side: Side,
    scorer: Scorer | SetScorer,
    look: Look,
    read: Read,
    key: Callable[[Shown], K],
    known: Callable[[K], T | None],
    compute: Callable[[list[K], list[Image.Image]], Sequence[T]],
    said: Said,
    batch: int,
) -> Iterator[tuple[int, T]]:
    """(place, value) of every image of a side that can be read: known by its key, or computed, `batch` keys at a time.

    Images of another size than the scorer's, and those without a finite value, are counted and said.
    """
    size: tuple[int, int] | None = getattr(scorer, "size", None)
    misfits: list[str] = []
    waiting: dict[K, tuple[Image.Image, list[int]]] = {}  # the image, and its places
    bad = 0

    def computed() -> Iterator[tuple[int, T]]:
        values = compute(list(waiting), [image for image, _ in waiting.values()])
        places = [places for _, places in waiting.values()]
        waiting.clear()
        for value, here in zip(values, places, strict=True):
            yield from ((place, value) for place in here)

    def found() -> Iterator[tuple[int, T]]:
        for place, (value, image) in enumerate(_images(side, look, read, key, known)):
            if value is not None:
                yield place, value
            elif image is not None and size is not None and image.size != size:
                misfits.append(f"{image.width} x {image.height}")
            elif image is not None:
                own = key(side.images[place])
                if own in waiting:
                    waiting[own][1].append(place)
                elif (value := known(own)) is not None:  # computed since the image was read
                    yield place, value
                else:
                    waiting[own] = image, [place]
                if len(waiting) == batch:
                    yield from computed()
            said(place + 1, len(side.images))
        if waiting:
            yield from computed()

    for place, value in found():
        bad += not np.isfinite(value).all()
        yield place, value
    if misfits:
        assert size is not None, "which they do not have"
        line = f"{scorer.name} judges images of {size[0]} x {size[1]} pixels, not {misfits[0]}"
        if len(misfits) == len(side.images):
            raise UserError(f"{line} as those of {side.name} are: name another scorer")
        left = counted(len(side.images), f"image of {side.name}", f"images of {side.name}")
        log.warning("%s: %d of %s %s left out", line, len(misfits), left, "is" if len(misfits) == 1 else "are")
    if bad:
        what = "features" if isinstance(scorer, SetScorer) else "score"
        images = counted(bad, f"image of {side.name}: it is", f"images of {side.name}: they are")
        log.warning("%s gave no finite %s to %s left out", scorer.name, what, images)


def _images(
    side: Side, look: Look, read: Read, key: Callable[[Shown], K], known: Callable[[K], T | None]
) -> Iterator[tuple[T | None, Image.Image | None]]:
    """For each image of a side what is known of it, else the image; neither for one that cannot be read."""

    def look_at(shown: Shown) -> tuple[T | None, Image.Image | None]:
        image = None
        if shown.path in look.unusable:
            return None, None
        if shown.path not in look.hashes and (image := _seen(shown.path, look, read)) is None:
            return None, None
        value = known(key(shown))
        return value, None if value is not None else image or read(shown.path)

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(side.images), 4 * BATCH):  # so many are in memory at most
            yield from pool.map(look_at, side.images[start : start + 4 * BATCH])


def _seen(path: Path, look: Look, read: Read) -> Image.Image | None:
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


class Table(NamedTuple):
    """Scores that another program wrote, by the name of a file and by the hash of an image's pixels, each with its row."""

    by_file: dict[str, tuple[int, float]]
    by_hash: dict[str, tuple[int, float]]


def read_table(path: Path) -> Table:
    """CSV, TSV or JSON lines with a file (or the hash of an image) and a number in each row.

    GenEval's results.jsonl (filename, correct) is one. Raises UserError, also for rows that contradict each other.
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
    return Table(by_file, by_hash)


def table_scores(sides: Sequence[Side], path: Path, look: Look, read: Read = read_image) -> dict[str, np.ndarray]:
    """The score [N] of each image of a side, by the side's name, from a table (`read_table`); nan where it has none, which is said.

    Files are compared by their path, or by its last parts; an image is read only where a hash must tell. Raises UserError, also
    for a row that names different images.
    """
    table = read_table(path)
    named = {side.name: [tables.name_of(image.path, table.by_file) for image in side.images] for side in sides}
    _check_names(sides, named, table, path, look, read)
    return {side.name: _of_rows(side, named[side.name], table, path, look, read) for side in sides}


def _check_names(
    sides: Sequence[Side], named: Mapping[str, Sequence[str | None]], table: Table, path: Path, look: Look, read: Read
) -> None:
    """Raises UserError for a row that names files of different images: its number is that of one of them."""
    first: dict[str, tuple[Side, Path]] = {}
    for side in sides:
        for image, name in zip(side.images, named[side.name], strict=True):
            if name is None:
                continue
            other, there = first.setdefault(name, (side, image.path))
            if there != image.path and (
                not (found := _hash(image.path, look, read)) or found != _hash(there, look, read)
            ):
                raise UserError(
                    f"row {table.by_file[name][0]} of {path} names {excerpt_of_path(name)}, which is an image of {other.name} "
                    f"({there}) and of {side.name} ({image.path}): give more of its path, or its hash"
                )


def _of_rows(side: Side, named: Sequence[str | None], table: Table, path: Path, look: Look, read: Read) -> np.ndarray:
    """The scores of one side, whose files the table calls by these names."""
    rows: list[tuple[int, float] | None] = []
    for image, name in zip(side.images, named, strict=True):
        if name is not None:
            rows.append(table.by_file[name])
        else:
            rows.append(table.by_hash.get(_hash(image.path, look, read)) if table.by_hash else None)
    found = np.array([math.nan if row is None else row[1] for row in rows])
    finite = int(np.isfinite(found).sum())
    if not finite:
        raise UserError(f"{path} has no score for any image of {side.name} in {side.place}")
    if lost := len(found) - finite:
        log.warning(
            "%d of %s of %s %s no score in %s: left out",
            lost,
            number_of(len(found), "images"),
            side.name,
            "has" if lost == 1 else "have",
            path,
        )
    return found


def _hash(path: Path, look: Look, read: Read) -> str:
    """The hash of an image's pixels; nothing for one that cannot be read."""
    if path not in look.hashes and path not in look.unusable:
        _seen(path, look, read)
    return look.hashes.get(path, "")

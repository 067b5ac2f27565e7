"""A number for every image by one scorer, each image and caption scored once, or from another program's table."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.common.words import counted_of, excerpt_of_path
from dpo.data.pairs import BadImage
from dpo.evaluating import tables
from dpo.evaluating.scoring import BATCH, READERS, Said, Table, read_table, to_score
from dpo.labelling.items import Item, Items, content
from dpo.scorers.cache import ScoreCache
from dpo.scorers.scorer import Scorer

log = logging.getLogger("dpo")

Key = tuple[str, str]  # the hash of an image's file, and the caption


class _Look(NamedTuple):
    """What an image's file gave: its key with the score that is known, or with its picture; or why it has none."""

    key: Key = ("", "")
    value: float | None = None
    image: Image.Image | None = None
    why: str = ""


@dataclass
class _Without:
    """The images without a score."""

    count: int = 0
    first: str = ""  # and why

    def add(self, why: str, count: int = 1) -> None:
        self.count, self.first = self.count + count, self.first or why

    def say(self, name: str, total: int) -> None:
        if self.count:
            log.warning(
                "%s: %s pairs are left out; the first: %s", name,
                counted_of(self.count, total, "images", "has no score, and its", "have no score, and their"), self.first,
            )  # fmt: skip


def scored(items: Items, scorer: Scorer, cache: ScoreCache, said: Said, places: range) -> np.ndarray:
    """The score [M] float64 of each image at `places`; nan for the others and for those that cannot be scored, which is said.

    An image is known by its file's content: with one caption it is scored once, however many pairs it is in and however
    often scoring is interrupted. A scorer sees BATCH pictures each time, the last of a part repeated, because rounding
    depends on how many are scored together. Raises UserError.
    """
    found = np.full(len(items), np.nan)
    waiting: dict[Key, tuple[Image.Image, list[int]]] = {}
    without, before = _Without(), 0

    def look(place: int) -> _Look:
        item = items[place]
        try:
            data = item.image.load()
            key = content(data), item.caption
            if (value := cache.get(key[0], scorer.fingerprint, key[1])) is not None:
                return _Look(key, value)
            return _Look(key, image=_fitting(to_score(data), scorer))
        except BadImage as error:
            return _Look(why=f"{_named(item)}: {error}")

    def compute() -> None:
        values = _values(scorer, list(waiting), [image for image, _ in waiting.values()])
        rows = [(*key, value) for key, value in zip(waiting, values, strict=True) if math.isfinite(value)]
        cache.put(scorer.fingerprint, rows)
        for (_, here), value in zip(waiting.values(), values, strict=True):
            found[here] = value if math.isfinite(value) else np.nan
            if not math.isfinite(value):
                without.add(f"it gave {value}", len(here))
        waiting.clear()

    with ThreadPoolExecutor(READERS) as pool:
        for begin in range(places.start, places.stop, 4 * BATCH):  # so many pictures are in memory at most
            part = range(begin, min(begin + 4 * BATCH, places.stop))
            for place, seen in zip(part, pool.map(look, part), strict=True):
                if seen.value is not None:
                    found[place] = seen.value
                    before += 1
                elif seen.image is None:
                    without.add(seen.why)
                elif seen.key in waiting:
                    waiting[seen.key][1].append(place)
                elif (value := cache.get(seen.key[0], scorer.fingerprint, seen.key[1])) is not None:
                    found[place] = value  # computed since its file was read
                else:
                    waiting[seen.key] = seen.image, [place]
                if len(waiting) == BATCH:
                    compute()
            said(part.stop - places.start, len(places))
        if waiting:
            compute()
    if before:
        log.info("%s: %d of %d images had their scores already", scorer.name, before, len(places))
    without.say(scorer.name, len(places))
    return found


def _fitting(image: Image.Image, scorer: Scorer) -> Image.Image:
    size: tuple[int, int] | None = getattr(scorer, "size", None)
    if size is not None and image.size != size:
        raise BadImage(
            f"{scorer.name} judges images of {size[0]} x {size[1]} pixels, not {image.width} x {image.height}"
        )
    return image


def _values(scorer: Scorer, keys: list[Key], images: list[Image.Image]) -> list[float]:
    more = BATCH - len(keys)
    captions = [caption for _, caption in keys]
    given = scorer.score(images=images + images[-1:] * more, captions=captions + captions[-1:] * more)
    values = given.double().numpy()
    if values.shape != (BATCH,):
        raise UserError(f"{scorer.name} gave {values.shape} scores for {BATCH} images: one each is needed")
    return values[: len(keys)].tolist()


def unreadable(items: Items) -> np.ndarray:
    """[M] bool: images that cannot be read, which is said: what no scorer looks at is looked at here."""

    def why(place: int) -> str:
        item = items[place]
        try:
            to_score(item.image.load())
        except BadImage as error:
            return f"{_named(item)}: {error}"
        return ""

    without = _Without()
    with ThreadPoolExecutor(READERS) as pool:
        found: list[str] = []
        for begin in range(0, len(items), 4 * BATCH):
            found += pool.map(why, range(begin, min(begin + 4 * BATCH, len(items))))
    for reason in filter(None, found):
        without.add(reason)
    without.say("reading", len(items))
    return np.array([bool(reason) for reason in found])


def of_table(items: Items, name: str, path: Path) -> np.ndarray:
    """The score [M] of each image from a table, nan where it has none, which is said.

    Rows name an image by its uid, by its file (whole or its last parts), or by the hash of its pixels. Raises UserError,
    also for a row that names several files.
    """
    table = read_table(path)
    without, named = _Without(), dict[int, str]()

    def value(place: int) -> float:
        item = items[place]
        try:
            row = _of_name(table, item, named, path) or _of_hash(table, item)
        except BadImage as error:
            without.add(f"{_named(item)}: {error}")
            return math.nan
        if row is None or not math.isfinite(row[1]):
            without.add(f"{_named(item)} is not in {path}")
            return math.nan
        return row[1]

    found = np.array([value(place) for place in range(len(items))], dtype=np.float64)
    if not np.isfinite(found).any():
        raise UserError(f"--scores {name}: {path} has no score for any image; the first, {without.first}")
    without.say(name, len(items))
    return found


def _of_name(table: Table, item: Item, named: dict[int, str], path: Path) -> tuple[int, float] | None:
    """The row of an image's uid or file; named: the files of rows before, by row, to which its own is added.

    Of a drawn image the uid is the bare name of its file, which those of other models have too: its path is what tells.
    """
    uid, file = item.image.uid, item.image.path
    if not item.model and (row := table.by_file.get(uid)) is not None:
        return row
    if file is None or (row := tables.of_file(Path(file), table.by_file, None)) is None:
        return None
    if (other := named.setdefault(row[0], file)) != file:
        raise UserError(
            f"{path}, row {row[0]}: names both {excerpt_of_path(other)} and {excerpt_of_path(file)}: "
            "give paths with the folder"
        )
    return row


def _of_hash(table: Table, item: Item) -> tuple[int, float] | None:
    """The row of an image's pixels. Raises BadImage where they must tell and cannot be read."""
    return table.by_hash.get(pixel_hash(to_score(item.image.load()))) if table.by_hash else None


def _named(item: Item) -> str:
    return f"image {excerpt_of_path(item.image.uid) or '(none)'}"

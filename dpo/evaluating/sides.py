"""What is compared: images with their prompts and seeds, and which image of one side belongs to which of the other."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import counted_of, excerpt, excerpt_of_path, is_unicode
from dpo.drawing import images
from dpo.evaluating import tables
from dpo.pages.folder import INDEX_FILE, holds_run

log = logging.getLogger("dpo")


class Shown(NamedTuple):
    """An image and what it was drawn from."""

    path: Path
    prompt: str
    seed: int | None = None  # None: not known
    category: str = ""


@dataclass(frozen=True)
class Side:
    """The images of one model, or of a folder that somebody else made."""

    name: str
    place: Path
    images: tuple[Shown, ...]
    protocol: Mapping[str, Any] | None = None  # how they were drawn; None where nobody wrote it down

    @property
    def prompts(self) -> int:
        return len({image.prompt for image in self.images})


@dataclass(frozen=True)
class Matched:
    """Pairs of images, one of each side, drawn from one prompt. N pairs, P prompts."""

    prompts: tuple[str, ...]  # [P], in the order of the first side
    categories: tuple[str, ...]  # [P]
    prompt: np.ndarray  # [N] int64, index into `prompts`
    a: np.ndarray  # [N] int64, index into the images of the first side
    b: np.ndarray  # [N] int64, of the second
    by_seed: bool  # pairs have the seed in common too
    left_out: tuple[int, int]  # images of either side without a partner


MAY_DIFFER = ("model",)  # of two protocols that are compared
TABLES = ("metadata.csv", "metadata.jsonl", "prompts.csv", "prompts.tsv", "prompts.jsonl")  # in a folder of images
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def of_folder(name: str, folder: Path, captions: Path | None = None) -> Side | None:
    """The images of a folder that dpo.sample drew, or that somebody else made with a table; None where it is neither.

    captions: the table, as `of_table` takes it. Raises UserError.
    """
    if (folder / images.PROTOCOL).is_file():
        return of_set(name, folder)
    return of_table(name, folder, captions) if is_of_images(folder) else None


def of_set(name: str, folder: Path) -> Side:
    """The images that dpo.sample drew into a folder. Raises UserError where some are missing or broken."""
    known = images.read_protocol(folder)
    shown = tuple(Shown(one.path, one.prompt, one.seed, one.category) for one in images.read_set(folder))
    return Side(name, folder, shown, known[0].to_json() if known else None)


def is_of_images(place: Path) -> bool:
    """Whether a folder holds images that another program made, and no model, nor a run without its result."""
    if not place.is_dir() or (place / INDEX_FILE).exists() or any(place.glob("*.safetensors")) or holds_run(place):
        return False
    return any(path.suffix.lower() in IMAGES for path in place.rglob("*"))


def of_table(name: str, folder: Path, table: Path | None) -> Side:
    """A folder of images that somebody else made; a table says what each was drawn from.

    table: rows of file, prompt and, where known, seed and category; None: one of TABLES in the folder. Images without a
    row are left out, which is said. Raises UserError.
    """
    place = table or next((found for one in TABLES if (found := folder / one).is_file()), None)
    if place is None:
        raise UserError(
            f"{folder} does not say what its images were drawn from: give --captions, a table of file, prompt and seed"
        )
    known: dict[str, tuple[str, int | None, str]] = {}
    rows: dict[str, int] = {}  # the number of the first row of each file
    for number, row in tables.rows(place):
        where = f"{place}, row {number}"
        file, prompt = tables.cell(row, tables.FILE, where), tables.cell(row, tables.PROMPT, where)
        if file is None or prompt is None:
            raise UserError(
                f"{where}: needs a file ({', '.join(tables.FILE)}) and a prompt ({', '.join(tables.PROMPT)})"
            )
        category = tables.cell(row, tables.CATEGORY, where) or ""
        for what, text in (("prompt", prompt), ("category", category)):
            if not is_unicode(text):
                raise UserError(f"{where}: the {what} {excerpt(text)} holds half a character; mend the escape")
        entry = (prompt, _seed(tables.cell(row, tables.SEED, where), where), category)
        rows.setdefault(file, number)
        if known.setdefault(file, entry) != entry:
            raise UserError(f"{where}: 2 rows name {excerpt_of_path(file)}, and they differ; keep one")
    # pipes and broken links too: what cannot be read is counted later
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and not path.is_dir())
    named = _named(files, folder, place, rows)
    images = tuple(Shown(path, *known[named[path]]) for path in files if path in named)
    if not images:
        raise UserError(f"{place} names none of the {len(files)} images in {folder}")
    if len(images) < len(files):
        log.warning(
            "%s: %s no row in %s: left out",
            folder,
            counted_of(len(files) - len(images), len(files), "images", "has", "have"),
            place,
        )
    taken = set(named.values())
    if gone := [file for file in known if file not in taken]:
        log.warning(
            "%s: %s no image in %s: left out, the first is %s",
            place, counted_of(len(gone), len(known), "rows", "names", "name"), folder, excerpt_of_path(gone[0]),
        )  # fmt: skip
    return Side(name, folder, images)


def _named(files: Sequence[Path], folder: Path, table: Path, rows: Mapping[str, int]) -> dict[Path, str]:
    """What a table calls each file that has a row; rows: the number of each by what it calls a file.

    Where several files end as a row says, it is of the one that it names from the folder or the table on. Raises UserError
    where that is not one.
    """
    meant: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if (name := tables.name_of(path, rows)) is not None:
            meant[name].append(path)
    found = {}
    for name, paths in meant.items():
        if len(paths) > 1:
            whole = [os.path.abspath(start / name.replace("\\", "/")) for start in (folder, table.parent)]
            exact = [path for path in paths if os.path.abspath(path) in whole]
            if len(exact) != 1:
                first, second, *_ = exact or paths
                raise UserError(f"{table}, row {rows[name]}: names both {first} and {second}: give more of the path")
            paths = exact
        found[paths[0]] = name
    return found


def _seed(text: str | None, where: str) -> int | None:
    """The seed in a cell. Raises UserError."""
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise UserError(f"{where}: the seed {excerpt(text)} is no whole number")
    return int(text)


def matched(a: Side, b: Side) -> Matched:
    """Pairs the images of two sides by prompt and seed; by prompt, in the order of each, where a seed is not known.

    Raises UserError where the sides have no prompt in common.
    """
    by_seed = all(image.seed is not None for side in (a, b) for image in side.images)
    mine, theirs = _places(a, by_seed), _places(b, by_seed)
    prompts: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    for key, places in mine.items():
        for one, other in zip(places, theirs.get(key, [])):  # a prompt may have more images on one side
            rows.append((prompts.setdefault(key[0], len(prompts)), one, other))
    if not rows:
        seeds = " with the same seed" if by_seed else ""
        raise UserError(
            f"{a.name} ({a.place}) and {b.name} ({b.place}) have no prompt{seeds} in common: draw both from one --prompts"
        )
    categories = {image.prompt: image.category for image in (*b.images, *a.images)}
    prompt, first, second = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Matched(
        prompts=tuple(prompts),
        categories=tuple(categories[text] for text in prompts),
        prompt=prompt,
        a=first,
        b=second,
        by_seed=by_seed,
        left_out=(len(a.images) - len(rows), len(b.images) - len(rows)),
    )


def _places(side: Side, by_seed: bool) -> dict[tuple[str, int | None], list[int]]:
    found: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for place, image in enumerate(side.images):
        found[image.prompt, image.seed if by_seed else None].append(place)
    return found


def _flat(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol, those of a mapping behind a point: versions.torch."""
    flat: dict[str, Any] = {}
    for name, value in protocol.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def check_protocols(sides: Sequence[Side], may_differ: Sequence[str] = ()) -> list[str]:
    """Lines on sides whose protocol is not known.

    Raises UserError that names the first field in which two known protocols differ, but for those that `may_differ`.
    """
    known = [side for side in sides if side.protocol is not None]
    for side in known[1:]:
        first, other = _flat(known[0].protocol or {}), _flat(side.protocol or {})
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        names = [name for name in differ if name.partition(".")[0] not in may_differ]
        if names:
            was, now = first.get(names[0]), other.get(names[0])
            raise UserError(
                f"{known[0].name} and {side.name} were drawn by different protocols ({names[0]}: {excerpt(was)} and {excerpt(now)}), "
                "so their scores cannot be compared: draw both alike"
            )
    unknown = [side.name for side in sides if side.protocol is None]
    return [f"how the images of {', '.join(unknown)} were drawn is not known: the comparison may not be fair"] * bool(
        unknown
    )

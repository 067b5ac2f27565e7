"""From a setting to pairs: recognises what --data names, opens it and holds some of its pairs out."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo.common.errors import UserError, reading
from dpo.common.hub import is_hub_id
from dpo.common.words import as_on_windows, counted, listed, number_of
from dpo.data import held_out, labelled
from dpo.data.arrow import has_splits, is_saved, open_arrow
from dpo.data.folders import METADATA, is_image, open_folders
from dpo.data.hub import SPLITS, files_of_split, hub_files
from dpo.data.labels import BLANK, SAME_BYTES, SOFT, UNREADABLE
from dpo.data.listing import CAPTION_FILES, JUNK, NOT_READ, Listing, NoSplit, is_of_files, list_files, not_read
from dpo.data.order import epoch_order
from dpo.data.pairs import InMemory, Source, Subset, caption_key, read_into_memory, things
from dpo.data.parquet import Files, open_parquet
from dpo.data.store.store import is_store, of_store, open_store
from dpo.data.tables import open_table
from dpo.data.tar import open_tar
from dpo.settings.config import Data

TABLES = (".jsonl", ".json", ".csv", ".tsv")
BESIDES = "summary.json"  # of our own commands, beside pairs; where nothing else is there, a table as any
MADE = (BESIDES, "pairs.html", "sheet.png")  # of dpo.pairs, beside its pairs
NOT_PAIRS = {*METADATA, "dataset_info.json", "dataset_infos.json", "state.json"}
ONE = {"ties": "tie", "invalid labels": "invalid label"}  # of the counts whose names are plurals
LAYOUTS = ("auto", "pickapic", "chosen-rejected")  # of columns
MAKERS = {  # by a folder that presets take their pairs from: the command that makes what is not there
    "labels": "label makes sets of labels (docs/label.md)",
    "stores": "prepare makes prepared stores (docs/prepare.md)",
}

log = logging.getLogger("dpo")


def open_source(data: Data, split: str | None = None, training: str | None = None) -> Source:
    """The pairs that data.data names, usable ones only.

    split: that of held-out pairs; None for training pairs, which have data.split. training: what names the training
    pairs beside them.

    data.data is a parquet, tar, JSONL, JSON or CSV file, a folder of such files, a folder with `w/` and `l/`, one that
    `save_to_disk` wrote, a prepared store, a glob, or a hub id. A split chooses among the files of a folder or hub data
    set; files named one by one or by a glob are all read; of a folder without splits `_is_whole` tells. Raises
    UserError when there is no such set, it cannot be read, columns are missing or no pair is usable.
    """
    with reading(str(data.data), "mend it, or leave out the file"):
        try:
            wanted = split or data.split
            source = _find(data, wanted, _is_whole(wanted, data.data, training))
        except NoSplit as error:
            flag = "--split" if split is None else "--validation-split"
            raise UserError(f"{error}; choose one with {flag}") from error
    if not len(source):
        hint = "; ties can be kept with --ties keep" if source.summary.get("ties") and split is None else ""
        raise UserError(f"{data.data}: no usable {things(source)} ({describe(source)}){hint}")
    return source


def check_output(data: Data, folder: Path) -> None:
    """Raises UserError where what is written into `folder` would be read as some of these pairs, or replace them."""
    root = Path(str(data.data)).expanduser()
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--output {folder} lies in the folder of the pairs, {root}: name a folder apart from it")
    places = [root] if root.exists() else [Path(one) for one in glob.iglob(str(root), recursive=True)]
    if any(one.resolve().is_relative_to(folder.resolve()) for one in places):
        raise UserError(f"--output {folder} holds the pairs, {root}: name a folder apart from them")


class Sources(NamedTuple):
    """The pairs of a run, and the settings that name them with the held-out share decided."""

    train: Source
    held_out: Source | None
    data: Data


def open_sources(data: Data) -> Sources:
    """Training pairs and held-out pairs, if any; the held-out ones are in memory unless they are in a prepared store.

    Held out are pairs of data.validation_data, or else a share of the training set (`held_out.decide`, `split`). At
    most data.validation_pairs are kept, the same ones every time; ties are left out, labels are not smoothed. Raises
    UserError.
    """
    train = open_source(data)
    data = held_out.decide(data, train)
    if data.validation_data is not None:
        unsmoothed = replace(data, data=data.validation_data, ties="drop", label_smoothing=0.0, max_pairs=None)
        held = _held_out(open_source(unsmoothed, data.validation_split, data.data), data)
        held_out.check_apart(data, train, held)
        return Sources(train, held, data)
    train, out = held_out.split(data, train)
    return Sources(train, None if out is None else _held_out(out, data), data)


def _is_whole(split: str, place: str | None, training: str | None) -> bool:
    """Whether a set without splits is read where this one is wanted, instead of being refused.

    To train on, and as held-out pairs with the default split, unless these are the training pairs themselves.
    """
    if (meant := SPLITS.get(split, split)) != "validation" or training is None:
        return meant in ("train", "validation")  # --compat trains on a split of the second name
    return Path(str(place)).expanduser().resolve() != Path(training).expanduser().resolve()


def _held_out(source: Source, data: Data) -> InMemory | Subset:
    if not len(source):
        raise UserError(f"{data.validation_data or data.data}: all held-out pairs are ties; hold out more")
    chosen = epoch_order(len(source), seed=0, epoch=0)[: data.validation_pairs]
    return Subset(source, np.sort(chosen)) if of_store(source) else read_into_memory(source, chosen)


def describe(source: Source) -> str:
    """One line for the log: "57 rows: 40 pairs; left out: 14 ties, 3 unlabelled; files not read: 2 .heic".

    Pairs and what was left out add up to the rows. Of images without partners: "57 rows: 40 images, 30 of them liked".
    """
    counts = {name: count for name, count in source.summary.items() if not is_of_files(name)}
    rows, pairs = counts.pop("rows", len(source)), counts.pop("pairs", len(source))
    kept_ties = int(np.sum(source.prob == 0.5))
    without_caption, soft = counts.pop(BLANK, 0), counts.pop(SOFT, 0)
    if kept_ties:
        counts.pop("ties", None)
    holes = counts.get(UNREADABLE, 0) + counts.get(SAME_BYTES, 0)
    if (rest := rows - pairs - (sum(counts.values()) - holes)) > 0:
        counts |= _rest(source, rest)
    notes = [counted(count, ONE.get(name, name), name) for name, count in counts.items() if count]
    what = things(source)
    text = f"{number_of(rows, 'rows')}: {number_of(pairs, what)}"
    text += f", {int(np.sum(source.prob > 0.5))} of them liked" if source.sides == 1 else ""
    text += f", {counted(kept_ties, 'of them a tie', 'of them ties')}" if kept_ties else ""
    text += f", {without_caption} {BLANK}" if without_caption else ""
    text += f", {soft} {SOFT}" if soft else ""
    text += f"; left out: {', '.join(notes)}" if notes else ""
    files = {name: count for name, count in source.summary.items() if is_of_files(name) and count}
    if read := files.pop(CAPTION_FILES, 0):
        text += f"; {counted(read, CAPTION_FILES[:-1], CAPTION_FILES)}"
    others = [f"{count} {name.removeprefix(NOT_READ)}" for name, count in files.items()]
    return text + (f"; {NOT_READ}{', '.join(others)}" if others else "")


def tell(source: Source) -> None:
    """Logs what was opened, and warns where nothing in it has a caption: then only the empty prompt is trained."""
    what = things(source)
    log.info("%s: %s", what, describe(source))
    if source.summary.get(BLANK, 0) >= len(source) and (source.caption_keys() == caption_key("")).all():
        log.warning(
            "none of the %s has a caption: only the empty prompt is trained; give them captions",
            number_of(len(source), what),
        )


def _rest(source: Source, rest: int) -> dict[str, int]:
    """Why so many rows are neither pairs nor counted otherwise."""
    if isinstance(source, InMemory):  # does not know what it was taken from
        return {"by --max-pairs or as held out": rest}
    held = min(len(source.source) - len(source), rest) if isinstance(source, Subset) else 0
    return {"as held out": held, "by --max-pairs": rest - held}


def _find(data: Data, split: str, whole: bool) -> Source:
    """Opens what data.data names; whole: also a set without splits. Raises UserError when there is no such thing."""
    name, kind = str(data.data), data.data_format
    path = Path(name).expanduser()
    if path.is_file():
        return _of_files([path], path.parent, data)
    if path.is_dir() and (kind == "store" or is_store(path)):
        _check_whole(path, split, whole)
        return open_store(path, data)
    if path.is_dir():
        return _of_folder(path, data, split, whole)
    if glob.has_magic(name):
        found = [
            p for p in glob.glob(str(path), recursive=True) if Path(p).name.lower() not in JUNK
        ]  # glob passes hidden ones over
        paths = sorted(Path(p) for p in found if Path(p).is_file())
        if not paths:
            raise UserError(f"{name}: matches no file")
        return _of_files(paths, Path(os.path.commonpath([p.parent for p in paths])), data)
    if is_hub_id(name) and kind in LAYOUTS:
        return open_parquet(hub_files(name, data, split), data, kind)
    made = [f"; python -m dpo.{maker}" for folder, maker in MAKERS.items() if folder in path.parts]
    raise UserError(
        f"{name}: no such file or folder, and not the id of a hub data set (owner/name){''.join(made) or as_on_windows(name)}"
    )


def _of_files(paths: list[Path], root: Path, data: Data) -> Source:
    """Opens files of one kind: any number of parquet files, or one table."""
    kinds = {path.suffix.lower() for path in paths}
    layout = data.data_format if data.data_format in LAYOUTS else "auto"
    if kinds == {".tar"} and data.data_format in (*LAYOUTS, "webdataset"):
        return open_tar(paths, data, layout)
    if kinds == {".parquet"} and data.data_format in LAYOUTS:
        names = [path.relative_to(root).as_posix() for path in paths]
        return open_parquet(Files(names, lambda name: str(root / name), str(root)), data, layout)
    tables = {"jsonl": (".jsonl", ".json"), "csv": (".csv", ".tsv"), "auto": TABLES}.get(data.data_format, TABLES)
    if len(paths) == 1 and kinds <= set(tables):
        return open_table(paths[0], data, layout)
    found = listed(sorted(path.name for path in paths)[:5])
    if len(kinds) == 1 and kinds <= set(TABLES):
        raise UserError(f"{root}: several tables ({found}); name one of them itself, such as {paths[0]}")
    kind = "" if data.data_format == "auto" else f"{data.data_format} "
    raise UserError(
        f"{root}: cannot read {found} as {kind}pairs; known are parquet, uncompressed tar, JSONL, JSON and CSV files"
    )


def _check_whole(folder: Path, split: str, whole: bool) -> None:
    """Raises NoSplit for a folder that has no splits where one is wanted."""
    if not whole:
        raise NoSplit(f"{folder}: has no split {split!r}, found train")


def _of_folder(folder: Path, data: Data, split: str, whole: bool) -> Source:
    """Opens a folder with `w/` and `l/`, a saved set, parquet files or tar shards at any depth, or one table."""
    kind = data.data_format
    if (made := labelled.place(folder)) is not None:  # images, scores and pages lie beside
        return _of_folder(made, data, split, whole)
    for root in (folder / split, folder):
        if kind in ("auto", "folders") and (root / "w").is_dir() and (root / "l").is_dir():
            _check_whole(folder, split, whole or root != folder)
            return open_folders(root, data)
    if kind in (*LAYOUTS, "arrow") and is_saved(folder):
        _check_whole(folder, split, whole or has_splits(folder))
        return open_arrow(folder, data, split, SPLITS, kind if kind in LAYOUTS else "auto")
    listing = list_files(folder)
    for suffix, own in ((".parquet", ()), (".tar", ("webdataset",))):
        files = [name for name in listing.files if name.lower().endswith(suffix)]
        if files and kind in (*LAYOUTS, *own):
            return _of_listed(folder, listing, files_of_split(files, split, str(folder)), files, data)
    beside = [name for name in listing.files if "/" not in name and not is_image(name)]
    tables = [name for name in beside if Path(name).suffix.lower() in TABLES and name.lower() not in NOT_PAIRS]
    tables = [name for name in tables if name != BESIDES] or tables
    tables = tables or [name for name in beside if name.lower() in METADATA]  # an imagefolder of two images a row
    if tables and kind in ("auto", "jsonl", "csv"):
        chosen = files_of_split(tables, split, str(folder)) if len(tables) > 1 or not whole else tables
        return _of_listed(folder, replace(listing, files=beside), chosen, tables, data)
    found = listed(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    wanted = "parquet, uncompressed tar, JSONL or CSV files, or folders w/ and l/"
    wanted = wanted if kind == "auto" else f"pairs of format {kind}"
    raise UserError(f"{folder}: needs {wanted}, found {found}")


def _of_listed(folder: Path, listing: Listing, chosen: list[str], alike: list[str], data: Data) -> Source:
    """Opens the files `chosen` of a folder's listing and counts the others; `alike` are those of the same kind."""
    source = _of_files([folder / name for name in chosen], folder, data)
    others = Counter({"of other splits": len(alike) - len(chosen)}) if len(alike) > len(chosen) else Counter()
    known = {*alike, *(MADE if _is_made(folder) else ())}
    source.summary.update(not_read(set(listing.files).difference(known), listing.passed_over + others))
    return source


def _is_made(folder: Path) -> bool:
    """Whether `dpo.pairs` made the pairs in this folder, and MADE beside them."""
    try:
        told = json.loads((folder / BESIDES).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("what") == "pairs"

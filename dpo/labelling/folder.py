"""The folder of a labelled set: what belongs to it, what it says of itself, and how far it is."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.common.errors import UserError
from dpo.common.files import remove, sweep
from dpo.common.words import SHOWN, listed
from dpo.data import labelled
from dpo.labelling import summary
from dpo.labelling.asked import Asked
from dpo.scorers.scorer import is_still

log = logging.getLogger("dpo")

CACHE, DRAWN, README = "scores.sqlite", "images", "README.md"
OWN = (labelled.FILE, labelled.FOLDER, CACHE, DRAWN, README, *summary.FILES)  # what stands in a folder of ours
OTHERS = ("model_index.json", "config.json", "config.toml", "store.json")  # models, runs and prepared stores
SOURCES = {"source": "of other pairs", "fit": "whose temperature was fitted on other pairs"}
PARTS = ".scored-*-of-*"  # notes of processes that share the work
FILE = re.compile(r"train-\d{5}-of-\d{5}\.parquet")


def files(rows: int, most: int) -> list[str]:
    """Names of the parquet files of so many rows, `most` in each."""
    count = -(-rows // most)
    return [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def begin(asked: Asked, folder: Path) -> bool:
    """Whether the folder holds all that is asked for already, of whatever images; a new label.json where it holds nothing.

    Raises UserError.
    """
    sweep(folder, labelled.FILE)
    known, said = labelled.read(folder), asked.said()
    if known is None:
        if strange := [name for name in (*OTHERS, *OWN) if (folder / name).exists()]:
            raise UserError(
                f"--output {folder} holds {listed(strange)} that python -m dpo.label did not make: name another folder"
            )
        labelled.write(folder, {"asked": said, "finished": False})
        return False
    data = folder / labelled.FOLDER
    if strange := [path.name for path in _visible(data) if not FILE.fullmatch(path.name)]:
        raise UserError(f"{data} holds {listed(strange)}, which python -m dpo.label did not make: move it elsewhere")
    was = known.get("asked", {})
    differ = [name for name in {**was, **said} if was.get(name) != said.get(name)]
    if differ and (asked.overwrite or not _visible(data)):
        _clear(folder, asked)
        return False
    if differ:
        name = differ[0]
        raise UserError(
            f"--output {folder} holds labels made otherwise ({name}: {_shown(was.get(name))} there, {_shown(said.get(name))} now): "
            "name another folder, or --overwrite them and keep their scores"
        )
    whole = known.get("finished") and all((data / name).is_file() for name in known.get("files", []))
    if whole and asked.overwrite:
        _clear(folder, asked)
        return False
    if known.get("finished") and not whole:
        labelled.write(folder, {**known, "finished": False})
    return bool(whole)


def _clear(folder: Path, asked: Asked) -> None:
    """Deletes the labels of a folder; its images and scores stay."""
    labelled.write(folder, {"asked": asked.said(), "finished": False})
    forget_parts(folder)
    for path in [*_visible(folder / labelled.FOLDER), *(folder / name for name in (README, *summary.FILES))]:
        remove(path)


def _shown(value: Any) -> str:
    return json.dumps(value)[:SHOWN]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def check_source(asked: Asked, folder: Path, made_of: Mapping[str, str]) -> bool:
    """Writes down what the labels are made of, by the names of SOURCES; whether that was known, and the same.

    Raises UserError where the folder has labels of others, which --overwrite replaces.
    """
    known = labelled.read(folder) or {}
    was = {name: known[name] for name in made_of if name in known}  # an earlier version did not say which "fit"
    differ = [name for name in was if was[name] != made_of[name]]
    if differ and _visible(folder / labelled.FOLDER) and not asked.overwrite:
        raise UserError(
            f"--output {folder} holds labels {SOURCES[differ[0]]}: name another folder, or --overwrite them"
        )
    if differ:
        _clear(folder, asked)
    if differ or len(was) < len(made_of):
        labelled.write(folder, {**(labelled.read(folder) or {}), **made_of})
    return "source" in was and not differ


def check_scorers(asked: Asked, folder: Path) -> None:
    """Raises UserError where a scorer is another by now than the one of its name that gave the finished labels."""
    names = [name for name, _ in asked.scorers]
    for one in labelled.judges(folder):
        if one["asked"] in names and not is_still(one["asked"], one["fingerprint"], asked.cache_dir):
            raise UserError(
                f"--output {folder} holds labels by {one['asked']} as it was before: name another folder, or --overwrite them"
            )


def all_scored(folder: Path, shard: tuple[int, int]) -> bool:
    """Notes that this process has scored its part; whether all have."""
    if shard[1] == 1:
        return True
    notes = [folder / f".scored-{i}-of-{shard[1]}" for i in range(shard[1])]
    notes[shard[0]].touch()
    left = [note.name for note in notes if not note.exists()]
    if left:
        log.info(
            "%s: this process has scored its part; the last one in this folder writes the labels (--merge those of other folders)",
            folder,
        )
    return not left


def forget_parts(folder: Path) -> None:
    """Deletes the notes of processes that have scored their parts."""
    for note in folder.glob(PARTS):
        remove(note)

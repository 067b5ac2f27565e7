"""Sets that `dpo.label` made: label.json says how and whether they are whole; the pairs lie in data/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.common.errors import UserError
from dpo.common.files import AGAIN, sealed, unseal, write_text

FILE, FOLDER = "label.json", "data"
SEAL, FORMAT = "sha256", 1
WHAT = "labelled pairs"  # under "what": other programs' files of this name lack it


def read(folder: Path) -> dict[str, Any] | None:
    """What label.json says; None where there is none, or another program's. Raises UserError for one that was changed."""
    path = folder / FILE
    try:
        content, whole = unseal(path.read_text("utf-8"), SEAL)
    except (OSError, ValueError):
        return None
    if content.get("what") != WHAT:
        return None
    if not whole or content.get("format") != FORMAT:
        raise UserError(f"{path} was changed, or is of another version: label into another folder")
    return content


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Replaces label.json in one step. Raises UserError where it cannot be written."""
    write_text(folder / FILE, sealed({"what": WHAT, "format": FORMAT, **content}, SEAL), AGAIN)


def judges(data: Path) -> list[dict[str, str]]:
    """Who labelled a set, which `data` names by its folder, its data/ or a file there: {name, asked, fingerprint} each.

    Empty for sets that `dpo.label` did not make; a set whose label.json was changed tells nothing.
    """
    for folder in (data, data.parent, data.parent.parent):
        try:
            content = read(folder)
            if content is not None:
                return [
                    {key: str(one[key]) for key in ("name", "asked", "fingerprint")}
                    for one in content["made_by"]["scorers"]
                ]
        except (UserError, KeyError, TypeError):
            return []
    return []


def place(folder: Path) -> Path | None:
    """The folder of the parquet files of a set that `dpo.label` made; None for another folder.

    Raises UserError for a set that is not whole.
    """
    content = read(folder)
    if content is None:
        return None
    if not content.get("finished"):
        raise UserError(f"{folder}: its labels are not all written: the same python -m dpo.label goes on from there")
    return folder / FOLDER

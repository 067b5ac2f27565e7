"""The texts of a run as they are uploaded: without the places of the user's own files."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

from dpo.pages.folder import CARD_FILE, CONFIG_FILE, METRICS_FILE, REPORT_FILE, SUMMARY_FILE, read_settings

TEXTS = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CARD_FILE, REPORT_FILE)


def published(folder: Path, name: str) -> bytes | Path:
    """The file `name` of the run in `folder` as others may read it; a path where it holds no text of the run.

    A setting that names a file or folder of this machine keeps its last part, and the home folder becomes "~".
    """
    file = folder / name
    if name not in TEXTS:
        return file
    text = file.read_text("utf-8")
    for place, shown in sorted(_places(folder).items(), key=lambda item: -len(item[0])):
        for form in {place, html.escape(place), json.dumps(place)[1:-1], json.dumps(place, ensure_ascii=False)[1:-1]}:
            text = text.replace(form, shown)
    return text.encode()


def _places(folder: Path) -> dict[str, str]:
    """What stands for each place of this machine that the settings name."""
    found = {str(Path.home()): "~", str(folder.resolve()): folder.resolve().name}
    for value in _texts(folder):
        path = Path(value).expanduser()
        if len(path.parts) > 1 and (path.is_absolute() or value.startswith(".") or path.exists()):
            found |= dict.fromkeys((value, str(path), str(path.resolve())), path.name)
    return {place: shown for place, shown in found.items() if len(Path(place).parts) > 1}


def _texts(folder: Path) -> Iterator[str]:
    for group in read_settings(folder).values():
        for value in group.values():
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one)

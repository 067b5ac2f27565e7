"""Whose labels a model was trained on, as far as the folder of its run says: a scorer does not judge its own pupils.

Pairs have a name where a listed scorer labelled them or learned from their labels (`Listed.labelled`, `Listed.learned`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo.common.errors import UserError
from dpo.data.store.files import read_index
from dpo.pages.folder import read_settings
from dpo.scorers.scorer import listed
from dpo.tiny import paths

EMBEDDED = "the embedded pairs"
PAIRS = {  # name of pairs -> what their place looks like, as --data names it
    EMBEDDED: re.compile(r"(^|[/\\])tiny[/\\]assets[/\\]pairs([/\\]|$)"),
    "Pick-a-Pic": re.compile(r"pick[-_. ]?a[-_. ]?pic", re.IGNORECASE),
}
STARTS = ("model", "unet_init", "lora_init")  # settings that may name another run


def trained_on(place: Path) -> set[str]:
    """The pairs, by a name of PAIRS, that the model at `place` and the ones it started from were trained on.

    place: a run's folder, its unet folder or its adapter file; empty for whatever else.
    """
    found: set[str] = set()
    waiting, seen = [place], set()
    while waiting:
        run = _run_at(waiting.pop())
        if run in seen or not (settings := read_settings(run)):
            continue
        seen.add(run)
        found.update(_named(settings.get("data", {}).get("data")))
        starts = [settings.get("model", {}).get(name) for name in STARTS]
        waiting += [Path(start).expanduser() for start in starts if isinstance(start, str)]
    return found


def cautions(scorers: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """A line for each scorer (as --scorers has it) that labelled the pairs a side was trained on, or learned from them.

    places: of the sides' models, by name.
    """
    pairs_of = {name: trained_on(Path(place).expanduser()) for name, place in places.items()}
    lines = []
    for scorer in scorers:
        if (known := listed(scorer)) is None:
            continue
        for pairs, how in [(one, "labelled") for one in known.labelled] + [
            (one, "learned from") for one in known.learned
        ]:
            if names := [name for name, found in pairs_of.items() if pairs in found]:
                lines.append(
                    f"{known.name} {how} {pairs}, which {' and '.join(names)} {'was' if len(names) == 1 else 'were'} trained "
                    "on: a gain by it is expected, and other scorers say more"
                )
    return list(dict.fromkeys(lines))


def _run_at(place: Path) -> Path:
    """The folder of the run that this place belongs to, if it is a run's at all."""
    return place.parent if place.name == "unet" or place.suffix == ".safetensors" else place


def _named(data: object) -> Iterator[str]:
    """The names of the pairs that a setting --data stands for, in a prepared store those that it was made of."""
    texts = [str(paths.train_pairs_path())] if data is None else [str(data), *_prepared(Path(str(data)).expanduser())]
    yield from (name for name, looks in PAIRS.items() if any(looks.search(text) for text in texts))


def _prepared(folder: Path) -> Iterator[str]:
    """What a store was made of, also one that was merged; nothing for other folders and damaged ones."""
    try:
        index = read_index(folder) or {}
        parts = [index] + [read_index(folder / part["path"]) or {} for part in index.get("parts", ())]
    except (UserError, OSError, ValueError):  # a hub id may be no path at all
        return
    yield from (str(source["name"]) for part in parts for source in part.get("sources", ()))

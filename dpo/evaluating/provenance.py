"""Whose labels a model was trained on, as far as the folder of its run says: a scorer does not judge its own pupils.

Pairs have a name where a listed scorer labelled them or learned from their labels (`Listed.labelled`, `Listed.learned`);
sets that `dpo.label` made say themselves who labelled them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpo.common.errors import UserError
from dpo.data import labelled
from dpo.data.store.files import read_index
from dpo.pages.folder import read_settings
from dpo.scorers.scorer import Listed, listed
from dpo.tiny import paths

EMBEDDED = "the embedded pairs"
DETAIL = "the embedded pairs of detail"
PAIRS = {  # name of pairs -> what their place looks like, as --data names it
    EMBEDDED: re.compile(r"(^|[/\\])tiny[/\\]assets[/\\]pairs([/\\]|$)"),
    DETAIL: re.compile(r"(^|[/\\])detail[/\\](train|validation)\.parquet$"),
    "Pick-a-Pic": re.compile(r"pick[-_. ]?a[-_. ]?pic", re.IGNORECASE),
}
STARTS = ("model", "unet_init", "lora_init")  # settings that may name another run


def trained_on(place: Path) -> set[str]:
    """The pairs, by a name of PAIRS, that the model at `place` and the ones it started from were trained on.

    place: a run's folder, its unet folder or its adapter file; empty for whatever else.
    """
    return {name for settings in _runs(place) for name in _named(settings.get("data", {}).get("data"))}


def labelled_by(place: Path) -> set[str]:
    """Names and fingerprints of the scorers that labelled, by `dpo.label`, pairs which the model at `place` was trained on.

    place: as of `trained_on`.
    """
    sets = [settings.get("data", {}).get("data") for settings in _runs(place)]
    return {
        text
        for data in sets
        if data is not None
        for one in _judges(Path(str(data)).expanduser())
        for text in one.values()
    }


def cautions(
    scorers: Sequence[str], places: Mapping[str, str], fingerprints: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """A line for each scorer (as --scorers has it) that labelled the pairs a side was trained on, or learned from them.

    places: of the sides' models, by name. fingerprints: of the scorers, where they are known.
    """
    pairs_of = {name: trained_on(Path(place).expanduser()) for name, place in places.items()}
    judges_of = {name: labelled_by(Path(place).expanduser()) for name, place in places.items()}
    lines = []
    for scorer in scorers:
        known = listed(scorer)
        for pairs, how in _ties_of(known):
            if names := [name for name, found in pairs_of.items() if pairs in found]:
                lines.append(_line(f"{scorer.partition(':')[0]} {how} {pairs}, which", names))
        called = {scorer, fingerprints.get(scorer, scorer)} | ({known.name} if known is not None else set())
        if names := [name for name, found in judges_of.items() if called & found]:
            lines.append(_line(f"{known.name if known is not None else scorer} labelled the pairs that", names))
    return list(dict.fromkeys(lines))


def _ties_of(known: Listed | None) -> list[tuple[str, str]]:
    """(pairs, how) of a scorer of the list: those whose labels it gave, and those from whose labels it was trained."""
    if known is None:
        return []
    return [(one, "labelled") for one in known.labelled] + [(one, "learned from") for one in known.learned]


def _line(what: str, names: Sequence[str]) -> str:
    return (
        f"{what} {' and '.join(names)} {'was' if len(names) == 1 else 'were'} trained on: a gain by it is expected, and other "
        "scorers say more"
    )


def _runs(place: Path) -> Iterator[Mapping[str, Any]]:
    """The settings of the run that a place belongs to, and of those that it started from."""
    waiting, seen = [place], set()
    while waiting:
        run = _run_at(waiting.pop())
        if run in seen or not (settings := read_settings(run)):
            continue
        seen.add(run)
        yield settings
        starts = [settings.get("model", {}).get(name) for name in STARTS]
        waiting += [Path(start).expanduser() for start in starts if isinstance(start, str)]


def _run_at(place: Path) -> Path:
    """The folder of the run that this place belongs to, if it is a run's at all."""
    return place.parent if place.name in ("unet", "transformer") or place.suffix == ".safetensors" else place


def _named(data: object) -> Iterator[str]:
    """The names of the pairs that a setting --data stands for, in a prepared store those that it was made of."""
    texts = [str(paths.train_pairs_path())] if data is None else [str(data), *_prepared(Path(str(data)).expanduser())]
    yield from (name for name, looks in PAIRS.items() if any(looks.search(text) for text in texts))


def _judges(data: Path) -> list[dict[str, str]]:
    """Who labelled a set, or those that a prepared store was made of, as it was when it was prepared."""
    of_sources = [
        one
        for source in _sources(data)
        for one in source.get("labelled_by", labelled.judges(Path(str(source["name"]))))
    ]
    return [*labelled.judges(data), *of_sources]


def _prepared(folder: Path) -> Iterator[str]:
    """What a store was made of."""
    yield from (str(source["name"]) for source in _sources(folder))


def _sources(folder: Path) -> list[Mapping[str, Any]]:
    """What a store says of its sources, also one that was merged; nothing for other folders and damaged ones."""
    try:
        index = read_index(folder) or {}
        parts = [index] + [read_index(folder / part["path"]) or {} for part in index.get("parts", ())]
    except (UserError, OSError, ValueError):  # a hub id may be no path at all
        return []
    return [source for part in parts for source in part.get("sources", ())]

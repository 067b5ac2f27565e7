"""From what a user asks for to evaluation.json: images drawn or read, scored, compared, and the pages made of it."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dpo.common import locks
from dpo.common.console import Progress
from dpo.common.errors import UserError
from dpo.common.files import AGAIN, sweep, write_text
from dpo.common.words import counted, digest
from dpo.drawing import images
from dpo.drawing.draw import network
from dpo.evaluating import provenance, reproduce, result, sets
from dpo.evaluating.asked import Asked, alike, checked, measured_otherwise
from dpo.evaluating.flags import Named
from dpo.evaluating.result import Group, Measure
from dpo.evaluating.scoring import Look, Said, features, read_image, scores, table_scores
from dpo.evaluating.sides import MAY_DIFFER, Side, check_protocols, matched, of_folder, of_set
from dpo.models.ready import pick_device
from dpo.pages import evaluation as pages
from dpo.sampling import model
from dpo.sampling import work as sampling
from dpo.scorers.cache import ScoreCache
from dpo.scorers.scorer import Scorer, fetch, listed, opened
from dpo.scorers.sets import SetScorer
from dpo.settings.config import Config
from dpo.tiny import unchanged

log = logging.getLogger("dpo")

DRAWN, CACHE = "images", "scores.sqlite"
VERSIONS = ("torch", "diffusers", "transformers")
LONGEST = 100  # bytes of the name of a folder
LINES = 4  # of progress for a scorer, where there is no terminal

LOOK = 1.0  # seconds between two looks at what other processes draw

T = TypeVar("T")


def evaluate(asked: Asked, folder: Path) -> Path:
    """Draws, scores and compares into `folder`; the path of its evaluation.json. Raises UserError."""
    began = time.monotonic()
    device = pick_device(asked.draw.device)
    with ExitStack() as stack:
        stack.enter_context(locks.held(folder, "--output"))
        for name in (result.FILE, pages.PAGE, pages.TABLE):
            sweep(folder, name)
        asked = alike(asked)
        config = checked(asked)
        for name in asked.scorers:
            fetch(name, asked.draw.cache_dir)
        scored = bool(asked.scorers or asked.tables)
        base, *rest = _sides(asked, folder) if scored else _undrawn(asked)
        groups, variants = rest[: len(asked.others)], rest[len(asked.others) :]
        compared = [side for group in (base, *groups) for side in group.sides]
        lines = _checked(compared) if scored else []
        cache = stack.enter_context(ScoreCache(folder / CACHE))
        look = Look()
        found = _measured(asked, compared, [group.sides[0] for group in variants], cache, look, device)
        content = _content(base.sides[0], groups, variants, found, look) if scored else _unscored(compared)
        names = [*asked.scorers, *(name for name, _ in asked.tables)]
        places = {named.name: named.place for named in asked.models}
        content["warnings"] = [*lines, *provenance.cautions(names, places, found.fingerprints), *content["warnings"]]
        if not (content["results"] or content["sets"]) and asked.pairs is None:
            for line in content["warnings"]:
                log.warning("%s", line)
            raise UserError("nothing can be compared: no prompt has images with a score on both sides")
        if config is not None:
            content["warnings"] += measured_otherwise(asked, config)
            content["accuracy"] = list(_accuracies(asked, config))
        if asked.reproduce is not None:
            content["published"] = _published(asked.reproduce, [base, *groups], found.scores)
        content["made"] = {
            "command": asked.command,
            "seconds": round(time.monotonic() - began, 1),
            "device": str(device),
            "versions": {library: version(library) for library in VERSIONS},
        }
        path = folder / result.FILE
        write_text(path, json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False), AGAIN)
        made = pages.write_pages(path)
    for line in content["warnings"]:
        log.warning("%s", line)
    for line in pages.headline(content):
        log.info("%s", line)
    log.info("%s, %s", path, ", ".join(one.name for one in made))
    return path


def _checked(sides: Sequence[Side]) -> list[str]:
    """Lines on sides whose protocol is not known. Raises UserError where two that are known differ.

    Pictures that came with the package may be of other versions of the libraries: some of them were drawn here too.
    """
    check_protocols([side for side in sides if not unchanged.are_from(side.protocol)], MAY_DIFFER)
    versions = ("versions",) if any(unchanged.are_from(side.protocol) for side in sides) else ()
    return check_protocols(sides, (*MAY_DIFFER, *versions))


def _undrawn(asked: Asked) -> Iterator[Group]:
    """The sides where nothing sees their images."""
    for name, seeds in ((asked.base.name, (asked.base,)), *asked.others):
        yield Group(name, tuple(Side(named.name, Path(named.place), ()) for named in seeds))


def _unscored(sides: Sequence[Side]) -> dict[str, Any]:
    """The content without images and scores."""
    nothing: dict[str, Any] = {"scorers": [], "results": [], "sets": [], "matching": {}, "warnings": []}
    return {"format": result.FORMAT, "sides": [result.side_entry(side, Look()) for side in sides], **nothing}


def _sides(asked: Asked, folder: Path) -> Iterator[Group]:
    """The images of everything that is compared: the base, the others, the base at its further guidances."""
    scales = [Named(f"{asked.base.name}, guidance {scale:g}", asked.base.place) for scale in asked.guidance[1:]]
    check_folders([one.name for one in (*asked.models, *scales)])
    first = asked.guidance[0] if asked.guidance else asked.draw.guidance
    draw = replace(asked.draw, guidance=first)
    yield Group(asked.base.name, (side_of(asked.base, draw, folder, asked.captions),))
    for method in asked.others:
        yield Group(method.name, tuple(side_of(named, draw, folder, asked.captions) for named in method.seeds))
    for named, scale in zip(scales, asked.guidance[1:], strict=True):
        yield Group(named.name, (side_of(named, replace(asked.draw, guidance=scale), folder, asked.captions),))


def side_of(
    named: Named, draw: sampling.Asked, folder: Path, captions: Path | None, shard: tuple[int, int] = (0, 1)
) -> Side:
    """The images of one side: those of a folder, or drawn with a model into a folder of its own below `folder`.

    captions: a table of the prompts of images that another program drew. shard: this process of so many, which draws its
    part and waits for the others'. Raises UserError.
    """
    if (found := of_folder(named.name, Path(named.place).expanduser(), captions)) is not None:
        return found
    own = folder / DRAWN / folder_of(named.name)
    log.info("%s: drawing with %s", named.name, named.place)
    sampling.draw(replace(draw, model=named.place, shipped=True), own, shard)
    _await(own)
    return of_set(named.name, own)


def folder_of(name: str) -> str:
    """The folder that a side of this name is drawn into: no path, whatever the name says."""
    plain = re.sub(r"[^\w.-]+", "-", name)
    if plain.strip(".") and len(plain.encode()) <= LONGEST:
        return plain
    return f"{plain.strip('.')[:40]}-{digest(name)[:8]}"


def _await(folder: Path) -> None:
    """Waits until other processes have drawn their images. Raises UserError where no new one came for a long time."""
    count, since = -1, time.monotonic()
    while not images.complete(folder):
        if (now := sum(1 for _ in (folder / images.IMAGES).glob("*.png"))) != count:
            count, since = now, time.monotonic()
        if time.monotonic() - since > sampling.FINISHING:
            raise UserError(
                f"{folder}: {counted(count, 'image is', 'images are')} there, and the other processes draw no more: start them again"
            )
        time.sleep(LOOK)


def check_folders(names: Sequence[str]) -> None:
    """Raises UserError for two names that give one folder; to some systems large and small letters are the same."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(folder_of(name).casefold(), name)) != name:
            raise UserError(f"{other} and {name} would be drawn into one folder: call them apart, as NAME=MODEL")


@dataclass
class Scored:
    """What all scorers say."""

    measures: list[Measure] = field(default_factory=list)  # of an image each
    scores: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # of each side by each measure
    of_sets: list[Measure] = field(default_factory=list)  # of all images of a side together
    sets: list[dict[str, Any]] = field(default_factory=list)  # as in the result
    lines: list[str] = field(default_factory=list)  # cautions
    fingerprints: dict[str, str] = field(default_factory=dict)  # of each scorer, as it was asked for


def _measured(
    asked: Asked,
    compared: Sequence[Side],
    variants: Sequence[Side],
    cache: ScoreCache,
    look: Look,
    device: torch.device,
) -> Scored:
    """All numbers of the sides that are compared, the base first, and the scores of its variants. One scorer is in memory at a time."""
    found = Scored()
    for name in asked.scorers:
        dtype = torch.bfloat16 if asked.half else torch.float32
        scorer, known = opened(name, device=device, dtype=dtype, cache_dir=asked.draw.cache_dir), listed(name)
        about = known._asdict() if known is not None else {}
        shown = {key: about[key] for key in ("scale", "higher_is_better", "resolution", "note") if key in about}
        label = f"{scorer.name}, bf16" if "bfloat16" in scorer.fingerprint else scorer.name  # never mixed with fp32
        measure = Measure(label, scorer.fingerprint, **shown)
        found.fingerprints[name] = scorer.fingerprint
        if isinstance(scorer, SetScorer):
            found.of_sets.append(measure)
            of_side = partial(_of_side, scorer, cache, look, found.lines)
            numbers = {side: number for side, number in _told(label, compared, of_side) if number is not None}
            made, lines = sets.entries(measure, compared[0].name, numbers)
            found.sets += made
            found.lines += lines
        else:
            found.measures.append(measure)
            of_images = partial(_of_images, scorer, cache, look)
            scored = _told(label, [*compared, *variants], of_images)
            found.scores |= {(side, label): values for side, values in scored}
        del scorer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, path in asked.tables:
        found.measures.append(Measure(name, f"table {path.name}", scale="as the table has it", note=str(path)))
        of_sides = table_scores((*compared, *variants), path, look)
        found.scores |= {(side, name): values for side, values in of_sides.items()}
    return found


def _told(label: str, sides: Sequence[Side], one: Callable[[Side, Said], T]) -> Iterator[tuple[str, T]]:
    """`one` of each side, by name; a line says how far all of them are."""
    total, before = sum(len(side.images) for side in sides), 0
    with Progress(total, lambda figures: [str(figures["what"])], 0, max(1, total // LINES), unit="image") as progress:
        for side in sides:

            def said(done: int, of: int, before: int = before, what: str = f"{label}, {side.name}") -> None:
                progress.update(before + done, {"what": what})

            yield side.name, one(side, said)
            before += len(side.images)


def _of_images(scorer: Scorer, cache: ScoreCache, look: Look, side: Side, said: Said) -> np.ndarray:
    return scores(side, scorer, cache, look, read_image, said)


def _of_side(
    scorer: SetScorer, cache: ScoreCache, look: Look, lines: list[str], side: Side, said: Said
) -> sets.Found | None:
    """The number of a side; None where its images are too few, which a line then says."""
    rows = features(side, scorer, cache, look, read_image, said)
    try:
        return sets.of_side(side, rows, look.hashes, scorer)
    except UserError as error:
        if str(error) not in lines:
            lines.append(str(error))
        return None


def _content(
    base: Side,
    groups: Sequence[Group],
    variants: Sequence[Group],
    scored: Scored,
    look: Look,
) -> dict[str, Any]:
    """The statistics of all sides."""
    measures, found = scored.measures, scored.scores
    results = [
        entry for group in groups for one in measures if (entry := result.compared(base, group, one, found)) is not None
    ]
    result.adjusted(results)
    if variants:
        at_best = {one.name: result.best([Group(base.name, (base,)), *variants], one, found) for one in measures}
        for entry in results:
            group = next(group for group in groups if group.name == entry["side"])
            one = next(one for one in measures if one.name == entry["scorer"])
            best = at_best[one.name]
            beaten = result.compared(best.sides[0], group, one, found)
            entry["best_guidance"] = {"base": best.name, "paired": beaten["paired"] if beaten else None}
    entries = [result.side_entry(side, look) for group in (Group(base.name, (base,)), *groups) for side in group.sides]
    return {
        "format": result.FORMAT,
        "sides": entries,
        "scorers": [asdict(one) for one in (*measures, *scored.of_sets)],
        "results": results,
        "sets": scored.sets,
        "matching": {side.name: result.matching_entry(matched(base, side)) for group in groups for side in group.sides},
        "warnings": [
            *(line for group in groups for line in result.same_images(base, group, look)),
            *result.cautions(results, entries),
            *scored.lines,
        ],
    }


def _accuracies(asked: Asked, config: Config) -> Iterator[dict[str, Any]]:
    """The implicit preference accuracy of every model, in reference to the base."""
    from dpo.evaluating.accuracy import by_side

    device = pick_device(asked.draw.device)

    def denoiser(named: Named) -> Any:
        found = model.opened(
            named.place, device=device, precision="fp32", lora_base=asked.draw.lora_base, cache_dir=asked.draw.cache_dir
        )
        return network(found.pipe)

    policies = {named.name: partial(denoiser, named) for named in asked.models[1:]}
    yield from by_side(config, partial(denoiser, asked.base), policies)


def _published(name: str, groups: Sequence[Group], found: dict[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """One's own figures beside a published table's."""
    chosen = reproduce.table(name)
    statistic = np.nanmedian if chosen.statistic == "median" else np.nanmean
    ours: dict[str, dict[str, float]] = {}
    for (side, scorer), values in found.items():
        ours.setdefault(side, {})[scorer] = float(statistic(values))
    lines = reproduce.beside(chosen, {name: ours[name] for group in groups for name in [group.sides[0].name]})
    return {
        "title": chosen.title,
        "source": chosen.source,
        "protocol": dict(chosen.protocol),
        "lines": [{**line._asdict(), "difference": line.difference} for line in lines],
    }

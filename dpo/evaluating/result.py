"""The statistics of an evaluation as one JSON object, which page, table and a later comparison are made from.

format      1
sides       [{name, place, images, prompts, unusable: [[file, why]], flat: [file], protocol}]; the first is the base
scorers     [{name, fingerprint, scale, higher_is_better, resolution, note}]
results     [{side, scorer, paired: {...}, p: Holm-adjusted, categories: {name: paired}, worth, best_guidance,
             gains, losses: [[prompt, difference, file of the base, file of the other]]}]
sets        [{scorer, side, value, interval}]; a figure of all images of a side together
accuracy    implicit preference accuracy on labelled pairs, by side
warnings    [lines]
matching    {side: {by_seed, left_out}}
made        {versions, seconds, command}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo.evaluating.scoring import Look
from dpo.evaluating.sides import Matched, Side, matched
from dpo.scorers import compare

FILE = "evaluation.json"
FORMAT = 1
SHOWN = 8  # prompts with the largest gains, and as many with the largest losses
SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Measure:
    """What a score is: enough to compare two of them."""

    name: str
    fingerprint: str
    scale: str = ""
    higher_is_better: bool = True
    resolution: float = 0.0  # differences up to this are ties
    note: str = ""


Scores = Mapping[tuple[str, str], np.ndarray]  # (side, measure) -> [images of the side]


@dataclass(frozen=True)
class Group:
    """A method: one model, or several that differ in the seed they were trained with."""

    name: str
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Table:
    """Paired scores of the base and a group, N rows, without those that lack a score."""

    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    prompt: np.ndarray  # [N] int64
    a: np.ndarray  # [N] float64
    b: np.ndarray  # [N] float64
    training: np.ndarray  # [N] int64, which side of the group
    files: list[tuple[str, str]]  # [N]


def table(base: Side, group: Group, measure: Measure, scores: Scores) -> Table:
    """The rows of every side of a group, prompts numbered alike."""
    numbers: dict[str, int] = {}
    categories: dict[str, str] = {}
    columns: list[list[Any]] = [[], [], [], []]
    files: list[tuple[str, str]] = []
    for seed, side in enumerate(group.sides):
        found = matched(base, side)
        categories |= dict(zip(found.prompts, found.categories, strict=True))
        a, b = scores[base.name, measure.name][found.a], scores[side.name, measure.name][found.b]
        for row in np.flatnonzero(np.isfinite(a) & np.isfinite(b)):
            prompt = found.prompts[found.prompt[row]]
            values = (numbers.setdefault(prompt, len(numbers)), a[row], b[row], seed)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            files.append((str(base.images[found.a[row]].path), str(side.images[found.b[row]].path)))
    return Table(
        prompts=tuple(numbers),
        categories=tuple(categories[prompt] for prompt in numbers),
        prompt=np.array(columns[0], dtype=np.int64),
        a=np.array(columns[1], dtype=np.float64),
        b=np.array(columns[2], dtype=np.float64),
        training=np.array(columns[3], dtype=np.int64),
        files=files,
    )


def compared(base: Side, group: Group, measure: Measure, scores: Scores) -> dict[str, Any] | None:
    """One entry of "results", still without `p`; None where no pair of images has both scores."""
    rows = table(base, group, measure, scores)
    if not len(rows.a):
        return None
    options: dict[str, Any] = {
        "resolution": measure.resolution, "higher_is_better": measure.higher_is_better, "seed": SEED,
    }  # fmt: skip
    training = rows.training if len(group.sides) > 1 else None
    whole = compare.paired(rows.prompt, rows.a, rows.b, training=training, **options)
    entry: dict[str, Any] = {"side": group.name, "scorer": measure.name, "paired": asdict(whole), "categories": {}}
    kinds = np.array(rows.categories, dtype=object)[rows.prompt]
    for kind in sorted({name for name in rows.categories if name}):
        part = kinds == kind
        chosen = None if training is None else training[part]
        found = compare.paired(rows.prompt[part], rows.a[part], rows.b[part], training=chosen, **options)
        entry["categories"][kind] = asdict(found)
    entry |= _extremes(rows, measure.higher_is_better)
    return entry


def _extremes(rows: Table, higher_is_better: bool) -> dict[str, list[Any]]:
    """The prompts with the largest gains and losses, each with the pair of images nearest to the prompt's own mean."""
    difference = (rows.b - rows.a) * (1 if higher_is_better else -1)
    count = np.bincount(rows.prompt)
    mean = np.bincount(rows.prompt, difference) / count
    order = np.argsort(-mean, kind="stable")
    found: dict[str, list[Any]] = {"gains": [], "losses": []}
    for name, chosen in (("gains", order[:SHOWN]), ("losses", order[::-1][:SHOWN])):
        for prompt in chosen:
            if (mean[prompt] > 0) != (name == "gains") or mean[prompt] == 0:
                continue
            here = np.flatnonzero(rows.prompt == prompt)
            row = here[np.argmin(np.abs(difference[here] - mean[prompt]))]
            found[name].append([rows.prompts[prompt], float(mean[prompt]), *rows.files[row]])
    return found


def adjusted(results: Sequence[dict[str, Any]]) -> None:
    """Adds to each entry its sign test's p, Holm-adjusted over all models and scorers."""
    for entry, p in zip(results, compare.holm([entry["paired"]["p_sign"] for entry in results]), strict=True):
        entry["p"] = p


def side_entry(side: Side, look: Look) -> dict[str, Any]:
    """One entry of "sides"."""
    mine = {image.path for image in side.images}
    return {
        "name": side.name,
        "place": str(side.place),
        "images": len(side.images),
        "prompts": side.prompts,
        "unusable": sorted([str(path), why] for path, why in look.unusable.items() if path in mine),
        "flat": sorted({str(path) for path in look.flat if path in mine}),
        "protocol": dict(side.protocol) if side.protocol is not None else None,
    }


def matching_entry(found: Matched) -> dict[str, Any]:
    return {"by_seed": found.by_seed, "pairs": len(found.a), "left_out": list(found.left_out)}


def cautions(results: Sequence[Mapping[str, Any]], sides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on what should make one wary of the figures."""
    lines = []
    for side in sides:
        if side["unusable"]:
            lines.append(f"{len(side['unusable'])} images of {side['name']} cannot be read and are left out")
        if side["flat"]:
            lines.append(f"{len(side['flat'])} images of {side['name']} are of one colour: {side['flat'][0]}")
    for name in dict.fromkeys(entry["side"] for entry in results):
        better = [e["scorer"] for e in results if e["side"] == name and e["paired"]["win_interval"][0] > 0.5]
        worse = [e["scorer"] for e in results if e["side"] == name and e["paired"]["win_interval"][1] < 0.5]
        if better and worse:
            lines.append(f"scorers disagree on {name}: better by {', '.join(better)}, worse by {', '.join(worse)}")
    return lines

"""The statistics of an evaluation as one JSON object, which page, table and a later comparison are made from.

format      1
sides       [{name, place, images, prompts, unusable: [[file, why]], flat: [file], protocol}]; the first is the base
scorers     [{name, fingerprint, scale, higher_is_better, resolution, note}]
results     [{side, scorer, paired: {...}, p: Holm-adjusted, categories: {name: paired}, worth, best_guidance,
             gains, losses: [[prompt, difference, file of the base, file of the other]]}]
sets        [{scorer, side, value, interval, images, difference, difference_interval}]; a figure of all images of a
             side together, for each side by each scorer of sets; its difference to the base's, None for that itself
accuracy    implicit preference accuracy on labelled pairs, by side
warnings    [lines]
matching    {side: {by_seed, left_out}}
made        {versions, seconds, command}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.common.words import counted, listed
from dpo.evaluating.scoring import Look
from dpo.evaluating.sides import Matched, Side, matched
from dpo.pages.better import standing
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
    category: np.ndarray  # [N] text, "" for none
    prompt: np.ndarray  # [N] int64
    a: np.ndarray  # [N] float64
    b: np.ndarray  # [N] float64
    training: np.ndarray  # [N] int64, which side of the group
    files: list[tuple[str, str]]  # [N]


def table(base: Side, group: Group, measure: Measure, scores: Scores) -> Table:
    """The rows of all sides of a group; prompts that one of them lacks are left out of all."""
    rows: list[tuple[str, float, float, int, tuple[str, str]]] = []
    categories: dict[str, str] = {}
    for seed, side in enumerate(group.sides):
        found = matched(base, side)
        categories |= dict(zip(found.prompts, found.categories, strict=True))
        a, b = scores[base.name, measure.name][found.a], scores[side.name, measure.name][found.b]
        for row in np.flatnonzero(np.isfinite(a) & np.isfinite(b)):
            files = str(base.images[found.a[row]].path), str(side.images[found.b[row]].path)
            rows.append((found.prompts[found.prompt[row]], float(a[row]), float(b[row]), seed, files))
    seeds_of: dict[str, set[int]] = {}
    for prompt, _, _, seed, _ in rows:
        seeds_of.setdefault(prompt, set()).add(seed)
    numbers = {
        prompt: i for i, prompt in enumerate(p for p, seeds in seeds_of.items() if len(seeds) == len(group.sides))
    }
    rows = [row for row in rows if row[0] in numbers]
    return Table(
        prompts=tuple(numbers),
        category=np.array([categories[row[0]] for row in rows], dtype=object),
        prompt=np.array([numbers[row[0]] for row in rows], dtype=np.int64),
        a=np.array([row[1] for row in rows], dtype=np.float64),
        b=np.array([row[2] for row in rows], dtype=np.float64),
        training=np.array([row[3] for row in rows], dtype=np.int64),
        files=[row[4] for row in rows],
    )


def compared(base: Side, group: Group, measure: Measure, scores: Scores) -> dict[str, Any] | None:
    """One entry of "results", still without `p`; None where no pair of images has both scores."""
    rows = table(base, group, measure, scores)
    if not len(rows.a):
        return None
    options: dict[str, Any] = {
        "resolution": measure.resolution,
        "higher_is_better": measure.higher_is_better,
        "training": rows.training,
        "seed": SEED,
    }
    columns = rows.prompt, rows.a, rows.b
    entry = {
        "side": group.name,
        "scorer": measure.name,
        "paired": asdict(compare.paired(*columns, **options)),
        "categories": {},
        "worth": _worth(rows, measure),
    }
    if any(rows.category):
        named = rows.category != ""
        options["training"] = rows.training[named]
        kinds = compare.by_category(rows.category[named].tolist(), *(column[named] for column in columns), **options)
        entry["categories"] = {kind: asdict(found) for kind, found in kinds.items()}
    return entry | _extremes(rows, measure.higher_is_better)


def _worth(rows: Table, measure: Measure) -> dict[str, Any] | None:
    """How many images of the base one would pick the best of; None where the base has one image a prompt."""
    _, first, where = np.unique([base for base, _ in rows.files], return_index=True, return_inverse=True)
    b = np.bincount(where, rows.b) / np.bincount(
        where
    )  # the mean over training seeds: an image of the base counts once
    found = compare.worth(rows.prompt[first], rows.a[first], b, higher_is_better=measure.higher_is_better, seed=SEED)
    if found is None:
        return None
    low, high = found.interval
    bound = "at least " if found.n >= found.limit else "no more than " if found.n <= 1 else ""
    return {**found._asdict(), "text": f"{bound}{found.n:.1f} ({low:.1f} to {high:.1f} of {found.limit})"}


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


def best(variants: Sequence[Group], measure: Measure, scores: Scores) -> Group:
    """The one of several single sides with the best mean score."""
    sign = 1 if measure.higher_is_better else -1
    return max(variants, key=lambda group: sign * float(np.nanmean(scores[group.sides[0].name, measure.name])))


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


def same_images(base: Side, group: Group, look: Look) -> list[str]:
    """A line where most images of a side are the base's own: one model under two names, perhaps."""
    lines = []
    for side in group.sides:
        found = matched(base, side)
        hashes = [
            (look.hashes.get(base.images[a].path), look.hashes.get(side.images[b].path))
            for a, b in zip(found.a, found.b, strict=True)
        ]
        same = sum(one == other is not None for one, other in hashes)
        if 2 * same > len(hashes):
            lines.append(
                f"{same} of {len(hashes)} images of {side.name} are those of {base.name}, pixel for pixel: is it another model?"
            )
    return lines


def matching_entry(found: Matched) -> dict[str, Any]:
    return {"by_seed": found.by_seed, "pairs": len(found.a), "left_out": list(found.left_out)}


def cautions(results: Sequence[Mapping[str, Any]], sides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on what should make one wary of the figures."""
    lines = []
    for side in sides:
        if side["unusable"]:
            which = [f"{Path(path).name} ({why.removeprefix(f'{path}: ')})" for path, why in side["unusable"]]
            one, many = (f"{what} of {side['name']} cannot be read and" for what in ("image", "images"))
            lines.append(f"{counted(len(which), f'{one} is', f'{many} are')} left out: {listed(which)}")
        if side["flat"]:
            flat = counted(len(side["flat"]), f"image of {side['name']} is", f"images of {side['name']} are")
            lines.append(f"{flat} of one colour: {side['flat'][0]}")
    for name in dict.fromkeys(entry["side"] for entry in results):
        mine = [entry for entry in results if entry["side"] == name]
        better, worse = ([e["scorer"] for e in mine if standing(e) == kind] for kind in ("better", "worse"))
        if better and worse:
            lines.append(f"scorers disagree on {name}: better by {', '.join(better)}, worse by {', '.join(worse)}")
    return lines

"""What a person should know of a set of pairs before hours are spent on it, a line each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import counted, counted_of, excerpt, excerpt_of_path
from dpo.data.labels import BLANK
from dpo.data.pairs import Labelled, Source, things
from dpo.data.parquet import ParquetSource
from dpo.data.sources import LAYOUTS, open_source
from dpo.pairing.look import Broken, Looked, Seen, apart
from dpo.settings.config import Data

FEW = 100  # pairs
ALIKE = 3.0  # root mean square of small copies, in levels of 255, below which two images are almost the same
LOST = 0.2  # share of an image's area, cut to a square, above which its ends are worth a word
ENOUGH = 0.9  # of the square's area, from which an image that is not square need not be enlarged
RARE = 0.02  # share of images above which a fault of some of them is one of the set
MANY = 20  # pairs of one image
TOKENS = 75  # of a caption between its two marks, in the 77 that CLIP reads
SURE, MOST = 20, 0.9  # pairs from which a direction can be seen, and the share that shows one
MORE = {"pairs": "rank", "images": "label"}  # what a person does to have more of them

# CLIP begins a new token at least here: words, single digits, runs of other marks. Long words take more than one.
PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_+")


@dataclass(frozen=True)
class Set:
    """A set of pairs or of images without partners, and those of them that were looked at."""

    source: Source
    data: Data
    looked: Sequence[Looked]
    captions: int  # different ones in all pairs
    resolution: int

    @property
    def images(self) -> dict[str, tuple[str, Seen]]:
        """Name and content of every sound image that was looked at, by a hash of its pixels."""
        sides = (side for one in self.looked for side in zip(one.names, one.seen, strict=True))
        return {seen.pixels: (name, seen) for name, seen in sides if isinstance(seen, Seen)}


def warnings(found: Set, checks: Sequence[Check] | None = None) -> list[str]:
    """One line for each thing that is wrong or unusual, the gravest first; checks: None for those of pairs."""
    return [line for check in checks or CHECKS for line in check(found)]


def broken(found: Set) -> Iterator[str]:
    wrong: dict[str, str] = {}
    for one in found.looked:
        for name, seen in zip(one.names, one.seen, strict=True):
            if isinstance(seen, Broken):
                wrong.setdefault(name, seen.why)
    if wrong:
        name, why = next(iter(wrong.items()))
        yield (
            f"{counted(len(wrong), 'image', 'images')} cannot be read, the first: {excerpt_of_path(name) or '(none)'} ({why}): mend them, or train "
            f"with --on-bad-image skip, which leaves {'their pairs' if found.source.sides == 2 else 'them'} out"
        )


def _direction(found: Set) -> Iterator[str]:
    source = found.source
    if len(source) < SURE:
        return
    sides = set(source.swap.tolist()) if isinstance(source, ParquetSource | Labelled) else set()
    if sides == {True} or (sides == {False} and _has_labels(found.data)):
        yield (
            f"the {'second' if True in sides else 'first'} image is the preferred one in all {len(source)} pairs: are these labels, "
            "or was a column filled with one value? Look at the pairs"
        )
    sizes = [
        (one.win.width * one.win.height, one.lose.width * one.lose.height)
        for one in found.looked
        if isinstance(one.win, Seen) and isinstance(one.lose, Seen)
    ]
    differ = [win < lose for win, lose in sizes if win != lose]
    if len(differ) >= SURE and np.mean(differ) > MOST:
        yield (
            f"the chosen image is the smaller one in {sum(differ)} of {len(differ)} pairs of different sizes: are the labels "
            "swapped? Look at the pairs"
        )


def _has_labels(data: Data) -> bool:
    """Whether a set has a column that says which image is preferred: then it can be read as Pick-a-Pic is."""
    if data.data_format not in LAYOUTS:
        return False
    try:
        return len(open_source(replace(data, data_format="pickapic"))) > 0
    except UserError:
        return False


def _circles(found: Set) -> Iterator[str]:
    better: dict[str, dict[str, set[str]]] = {}
    names: dict[str, str] = {}
    for one in found.looked:
        if isinstance(one.win, Seen) and isinstance(one.lose, Seen) and one.win.pixels != one.lose.pixels:
            better.setdefault(one.caption, {}).setdefault(one.win.pixels, set()).add(one.lose.pixels)
            names |= {one.win.pixels: one.names[0], one.lose.pixels: one.names[1]}
    circles = [circle for graph in better.values() if (circle := _circle(graph))]
    if circles:
        first = ", ".join(excerpt_of_path(names[image]) for image in circles[0][:4])
        yield (
            f"{counted(len(circles), 'caption has', 'captions have')} images that beat each other in a circle, such as {first}: "
            "the labels contradict each other there, leave some of these pairs out"
        )


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Images that each beat the next and the last the first; none where there is an order."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1][:-1])
    return []


def few(found: Set) -> Iterator[str]:
    if len(found.source) < FEW:
        what = things(found.source)
        there = counted(len(found.source), f"{what[:-1]} is", f"{what} are")
        yield (
            f"{there} few, and what a run shows on so few hangs on chance: {MORE[what]} more images, a few hundred {what} are usual"
        )


def captions(found: Set) -> Iterator[str]:
    count, what = len(found.source), things(found.source)
    blank = found.source.summary.get(BLANK, 0)
    if found.captions == 1 and count > 1 and not blank:  # else the one is the empty one
        yield (
            f"all {count} {what} have one caption: the model learns this one alone, and {what} that are held out have it too; "
            f"{MORE[what]} images of more prompts"
        )
    if blank:
        without = counted_of(blank, count, what, "has no caption, and trains", "have no caption, and train")
        yield f"{without} the empty prompt: give {'the images' if what == 'pairs' else 'each'} one"
    long = [one.caption for one in found.looked if len(PIECES.findall(one.caption)) > TOKENS]
    if long:
        yield (
            f"{counted_of(len(long), len(found.looked), 'captions', 'is', 'are')} longer than the 77 tokens that CLIP reads (words, "
            f"digits and marks counted, which is the least): the rest is cut off, the first: {excerpt(long[0], 40)}; shorten what is longer"
        )


def shapes(found: Set) -> Iterator[str]:
    images = found.images
    lost = [1 - min(seen[:2]) / max(seen[:2]) for _, seen in images.values()]
    much = [share for share in lost if share > LOST]
    if len(much) > RARE * len(images):
        wide = counted_of(
            len(much), len(images), "images", "is far from square and loses", "are far from square and lose"
        )
        its = _its(much)
        yield (
            f"{wide} {np.mean(much):.0%} of {its} area on average, at both ends, when cut to a square: --buckets keeps {its} shape"
        )
    small = [seen for _, seen in images.values() if min(seen[:2]) < found.resolution]
    if len(small) > RARE * len(images):
        large = all(seen.width * seen.height >= ENOUGH * found.resolution**2 for seen in small)
        cure = (
            f"--buckets keeps {_its(small)} area" if large else "give larger ones, or train with a lower --resolution"
        )
        yield (
            f"{counted_of(len(small), len(images), 'images', 'has', 'have')} a side below {found.resolution} pixels (the shortest "
            f"{min(min(seen[:2]) for seen in small)}) and would be enlarged to the square: {cure}"
        )


def _its(images: Sequence[object]) -> str:
    return "its" if len(images) == 1 else "their"


def _alike(found: Set) -> Iterator[str]:
    alike = [one for one in found.looked if is_alike(one)]
    if alike:
        yield (
            f"{counted_of(len(alike), len(found.looked), 'pairs', 'has', 'have')} two images that are almost the same, the first: "
            f"{excerpt_of_path(alike[0].names[0])} and {excerpt_of_path(alike[0].names[1])}: there is little to learn from that"
        )
    times = Counter(seen.pixels for one in found.looked for seen in (one.win, one.lose) if isinstance(seen, Seen))
    if times and times.most_common(1)[0][1] > MANY:
        pixels, most = times.most_common(1)[0]
        crowded = sum(count > MANY for count in times.values())
        yield (
            f"{counted(crowded, 'image is', 'images are')} in more than {MANY} pairs each, the most in {most}: "
            f"{excerpt_of_path(found.images[pixels][0])}; few images then decide much, "
            f"--max-per-image {MANY} of python -m dpo.pairs spreads the pairs"
        )


def is_alike(one: Looked) -> bool:
    """Whether the two images of a pair are almost the same."""
    return isinstance(one.win, Seen) and isinstance(one.lose, Seen) and apart(one.win, one.lose) < ALIKE


Check: TypeAlias = Callable[[Set], Iterator[str]]
CHECKS: tuple[Check, ...] = (
    broken, _direction, _circles, few, captions, shapes, _alike,
)  # fmt: skip

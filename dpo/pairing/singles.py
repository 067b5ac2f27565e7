"""What a person should know of a set of images without partners before hours are spent on it, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dpo.common.words import counted, counted_of, excerpt_of_path
from dpo.pairing import warn
from dpo.pairing.look import Looked, Seen
from dpo.pairing.warn import ALIKE, MOST, SURE, Check, Set

LABELS = ("liked", "not liked")
BLOCK = 256  # images that are compared with all before them at once


def label(one: Looked) -> str:
    """An image's label in words."""
    return LABELS[0 if one.liked else 1]


def _labels(found: Set) -> Iterator[str]:
    """Labels of one kind, and a label that is rare."""
    liked, count = int(np.sum(found.source.prob > 0.5)), len(found.source)
    rare = min(liked, count - liked)
    if not rare:
        yield (
            f"{'all' if liked else 'none'} of the {counted(count, 'image is', 'images are')} liked: labels of one kind say nothing "
            f"about what to prefer; add images that are {LABELS[liked > 0]}, or look at the column of labels"
        )
    elif count >= SURE and count - rare > MOST * count:
        which = LABELS[2 * liked > count]
        flag = "--kto-disliked-weight" if 2 * liked > count else "--kto-liked-weight"
        yield (
            f"only {counted_of(rare, count, 'images', f'is {which}, and has', f'are {which}, and have')} little say: add more of "
            f"them, or {flag} {(count - rare) / rare:.3g}, with which both labels weigh the same"
        )


def _contradictions(found: Set) -> Iterator[str]:
    """One picture of one caption with both labels."""
    said: dict[tuple[str, str], Looked] = {}
    against = []
    for one in found.looked:
        if isinstance(one.win, Seen):
            first = said.setdefault((one.caption, one.win.pixels), one)
            if first.liked != one.liked:
                against.append((first, one))
    if against:
        yield (
            f"{counted(len(against), 'picture is', 'pictures are')} there as liked and as not liked under the same caption, "
            f"the first: {_names(against[0])}: the labels contradict each other there, leave one of each out"
        )


def _twins(found: Set) -> Iterator[str]:
    pairs = twins(found.looked)
    images = {one.key for pair in pairs for one in pair}
    if pairs:
        yield (
            f"{len(images)} of {len(found.looked)} images are almost the same as another of their caption, the first: "
            f"{_names(pairs[0])}: they count twice, and where captions are not held out whole one of them may be trained on and "
            "the other held out; leave the doubles out"
        )


def _names(pair: Sequence[Looked]) -> str:
    return " and ".join(excerpt_of_path(one.names[0]) or f"image {one.place}" for one in pair)


def twins(looked: Sequence[Looked]) -> list[tuple[Looked, Looked]]:
    """Images that are almost the same as another of the same caption, each with the first such one."""
    groups: dict[str, list[tuple[Looked, Seen]]] = {}
    for one in looked:
        if isinstance(one.win, Seen):
            groups.setdefault(one.caption, []).append((one, one.win))
    return [pair for group in groups.values() for pair in _alike(group)]


def _alike(group: Sequence[tuple[Looked, Seen]]) -> Iterator[tuple[Looked, Looked]]:
    """Those of one caption, by their small copies: root mean square below ALIKE levels."""
    small = np.stack([seen.small.astype(np.float64).reshape(-1) for _, seen in group])
    sizes = np.square(small).sum(1)
    for begin in range(0, len(small), BLOCK):
        rows, upto = small[begin : begin + BLOCK], min(begin + BLOCK, len(small))
        products = rows @ small[:upto].T  # of whole numbers, and so exact
        near = sizes[begin:upto, None] + sizes[:upto] - 2 * products < ALIKE**2 * small.shape[1]
        for i in range(begin, upto):
            if (first := int(near[i - begin, : i + 1].argmax())) < i:  # each is near to itself
                yield group[first][0], group[i][0]


CHECKS: tuple[Check, ...] = (
    warn.broken, _labels, _contradictions, warn.few, warn.captions, warn.shapes, _twins,
)  # fmt: skip

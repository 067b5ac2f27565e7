"""pairs.html of a set of pairs: chosen beside rejected, and what is to be known before a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dpo.pages.labels import Cell, as_shown
from dpo.pages.report import Tile, template

PAGE, SHEET = "pairs.html", "sheet.png"


class Words(NamedTuple):
    """What the page is of, and how swapped labels are seen on it."""

    kind: str
    hint: str


SWAPPED = "If the images {which} are not the better ones, the labels are swapped: a run would learn the opposite."
PAIRS = Words("Preference pairs", SWAPPED.format(which="on the left"))
IMAGES = Words("Images with a label each", SWAPPED.format(which="that are liked"))


def render(
    direction: str,
    sentences: Sequence[str],
    warnings: Sequence[str],
    tiles: Sequence[Tile],
    groups: Sequence[tuple[str, Sequence[Cell]]],
    words: Words = PAIRS,
) -> str:
    """The page, as HTML without script or network.

    direction: which image of a pair is the chosen one, in words; groups: (title, pairs).
    """
    return template("pairs.html").render(
        words=words,
        title=direction[:1].upper() + direction[1:],
        sentences=list(sentences),
        warnings=list(warnings),
        tiles=list(tiles),
        groups=as_shown([(title, cells) for title, cells in groups if cells]),
    )

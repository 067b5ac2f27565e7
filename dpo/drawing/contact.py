"""The contact sheet of a set of pairs: the chosen image beside the rejected one, with what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dpo.common.files import write_whole
from dpo.drawing.grid import GAP, INK, MARGIN, PAPER, QUIET, fitted

SIDE, COLUMNS = 200, 3  # pixels of an image's side, and pairs in a row
TOP, TEXT = 44, 50  # pixels of the first line, and of the two lines above a pair


class Pair(NamedTuple):
    """A caption, and two images with what stands above each, the chosen one first."""

    caption: str
    images: Sequence[tuple[str, Image.Image]]


def write_contact(path: Path, head: str, pairs: Sequence[Pair]) -> None:
    """Writes a PNG in one step: `head` as its first line, then the pairs, COLUMNS in a row, images whole on squares.

    Raises OSError where it cannot be written.
    """
    wide = 2 * SIDE + GAP
    rows = -(-len(pairs) // COLUMNS)
    size = COLUMNS * (wide + 2 * MARGIN), MARGIN + TOP + rows * (TEXT + SIDE + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    large, title, label = (ImageFont.load_default(points) for points in (22, 15, 13))
    pen.text((MARGIN, MARGIN), fitted(pen, head, large, size[0] - 2 * MARGIN), INK, large)
    for place, pair in enumerate(pairs):
        row, column = divmod(place, COLUMNS)
        left, top = MARGIN + column * (wide + 2 * MARGIN), MARGIN + TOP + row * (TEXT + SIDE + MARGIN)
        pen.text((left, top), fitted(pen, pair.caption, title, wide), INK, title)
        for side, (said, image) in enumerate(pair.images):
            x = left + side * (SIDE + GAP)
            pen.text((x, top + 24), fitted(pen, said, label, SIDE), QUIET, label)
            sheet.paste(
                ImageOps.pad(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS, PAPER), (x, top + TEXT)
            )
    write_whole(path, lambda part: sheet.save(part, format="PNG"))

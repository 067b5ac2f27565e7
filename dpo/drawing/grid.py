"""The PNG grid of sample images for fixed prompts and seeds, policy beside reference.

    before = sample(pipeline_of(model), prompts, seeds, device="cuda", steps=50, guidance=7.5)
    after = sample(pipeline_of(model, policy), prompts, seeds, device="cuda", steps=50, guidance=7.5)
    write_grid(folder / "samples/step_000500.png", prompts, seeds, {"before": before, "after": after})

`sample` is that of draw.py, `pipeline_of` that of models/pipeline.py. A grid carries its prompts, seeds and layout in a
PNG text chunk; `read_grid` cuts it into its images again.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dpo.common.files import write_whole
from dpo.common.words import first_line

log = logging.getLogger("dpo")

CHUNK = "dpo-grid"  # the keyword of the text chunk


MARGIN, GAP, SMALLEST, LARGEST = 16, 8, 160, 512  # pixels; the last two bound the side of an image in the grid


NARROWEST = 560  # pixels: a prompt is read above a single image too
INK, QUIET, PAPER = "#1b1b1f", "#66666e", "#ffffff"


class Cell(NamedTuple):
    """One prompt and seed of a grid: its images by column label, in the grid's order."""

    prompt: str
    seed: int
    images: dict[str, Image.Image]


def write_grid(
    path: Path, prompts: Sequence[str], seeds: Sequence[int], columns: Mapping[str, Sequence[Image.Image]]
) -> Path:
    """Writes a labelled PNG, in one step: a row per prompt, and for each seed the columns side by side (before, after).

    columns: label -> images, prompt by prompt and for each prompt seed by seed, as `sample` gives them. Returns `path`.
    """
    sides = {image.size for images in columns.values() for image in images}
    native = max(max(size) for size in sides)
    side = min(max(native, SMALLEST), LARGEST)
    group = len(columns) * side + (len(columns) - 1) * GAP
    width = max(NARROWEST, 2 * MARGIN + len(seeds) * group + (len(seeds) - 1) * 2 * MARGIN)
    row_height = 52 + side + MARGIN
    grid = Image.new("RGB", (width, MARGIN + len(prompts) * row_height), PAPER)
    pen = ImageDraw.Draw(grid)
    title, label = ImageFont.load_default(18), ImageFont.load_default(13)
    boxes = []
    for row, prompt in enumerate(prompts):
        top = MARGIN + row * row_height
        pen.text((MARGIN, top), fitted(pen, prompt, title, width - 2 * MARGIN), INK, title)
        for place, seed in enumerate(seeds):
            for column, (name, images) in enumerate(columns.items()):
                left = MARGIN + place * (group + 2 * MARGIN) + column * (side + GAP)
                image = images[row * len(seeds) + place].convert("RGB")
                method = Image.Resampling.NEAREST if side > max(image.size) else Image.Resampling.LANCZOS
                grid.paste(image.resize((side, side), method), (left, top + 52))
                pen.text((left, top + 30), fitted(pen, f"{name} · seed {seed}", label, side), QUIET, label)
                boxes.append([row, seed, name, left, top + 52, side])
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps({"prompts": list(prompts), "boxes": boxes}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: grid.save(part, format="PNG", pnginfo=info))
    return path


def read_grid(path: Path) -> list[Cell]:
    """The images of a grid by prompt and seed; empty for a PNG that `write_grid` did not make."""
    if (picture := read_picture(path)) is None or CHUNK not in picture.info:
        return []
    cells: dict[tuple[int, int], Cell] = {}
    try:
        layout = json.loads(picture.info[CHUNK])
        for row, seed, name, left, top, side in layout["boxes"]:
            if not (side > 0 and 0 <= left <= picture.width - side and 0 <= top <= picture.height - side):
                return []
            cell = cells.setdefault((row, seed), Cell(str(layout["prompts"][row]), int(seed), {}))
            cell.images[str(name)] = picture.crop((left, top, left + side, top + side))
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):  # another program's chunk
        return []
    return list(cells.values())


def read_picture(path: Path) -> Image.Image | None:
    """A PNG as RGB; None, with a warning, for one that cannot be read: anybody may have put it there."""
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            found = opened.convert("RGB")
            found.info = {**opened.info, **getattr(opened, "text", {})}
            return found
    except (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        log.warning("%s cannot be read and is left out (%s)", path, first_line(error))
        return None


def fitted(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """The text, cut with an ellipsis so that it is at most `width` pixels wide."""
    text = " ".join(text.split())
    if len(text) <= width and pen.textlength(text, font) <= width:
        return text
    text = text[:width]  # a character takes a pixel at least: what is longer is not even measured
    most = bisect_right(range(len(text) + 1), width, key=lambda count: ceil(pen.textlength(text[:count] + "…", font)))
    return text[: max(0, most - 1)].rstrip() + "…"

"""Contact sheets of a set: a row a prompt, its seeds side by side, the strengths in a row, base beside aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from dpo.drawing.grid import PAPER, write_grid
from dpo.drawing.images import Drawn

SHEETS = "sheets"
ROWS, SEEDS, SIDE = 8, 4, 256  # of one sheet: prompts, seeds of each, pixels of an image's side at most


def write_sheets(folder: Path, sets: Mapping[str, Sequence[Drawn]], most: int) -> list[Path]:
    """Writes at most `most` sheets into `folder`/sheets, one after another, so that memory holds one; their paths.

    sets: a label ("base", "aligned") -> all images of a set by index, drawn by one protocol but for the model.
    """
    first = next(iter(sets.values()))
    numbers = list(dict.fromkeys(one.number for one in first))
    strengths = list(dict.fromkeys(one.strength for one in first))
    block = len(numbers) * len(strengths)  # images of one row in every set, which lie side by side
    several = len({one.layout for one in first}) > 1  # init images: the prompt of a row does not tell them apart
    paths: list[Path] = []
    for start in range(0, len(first), block * ROWS):
        if len(paths) == most:
            break
        rows = range(start, min(start + block * ROWS, len(first)), block)
        columns = {
            label if strength is None else f"{label} {strength:g}": [
                _small(images[row + place * len(numbers) + seed].path)
                for row in rows
                for seed in range(len(numbers[:SEEDS]))
            ]
            for label, images in sets.items()
            for place, strength in enumerate(strengths)
        }
        path = folder / SHEETS / f"sheet-{len(paths):03d}.png"
        titles = [
            f"layout {first[row].layout + 1}: {first[row].prompt}" if several else first[row].prompt for row in rows
        ]
        paths.append(write_grid(path, titles, numbers[:SEEDS], columns))
    return paths


def _small(path: Path) -> Image.Image:
    """The image, whole, on a square."""
    with Image.open(path, formats=("PNG",)) as opened:
        image = opened.convert("RGB")
    side = min(SIDE, max(image.size))
    return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, PAPER)

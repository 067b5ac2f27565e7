"""dpo.label in the test's own process, sets and images to label, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dpo import label
from tests.help.commands import quietly
from tests.help.drawing import files

GREY = ("--scorers", "tests.help.judges:Grey")


def labelled(capsys, *words: object, output: Path) -> tuple[int, str]:
    """Runs `python -m dpo.label words... --output output`: its exit code and what it wrote to stderr."""
    return quietly(label.main, capsys, *words, "--output", output)


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of a labelled set, file by file."""
    return [row for path in sorted((output / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def left(output: Path) -> dict[str, bytes]:
    """Every file of a labelled set but its cache of scores, whose bytes depend on the order of writing."""
    return {name: data for name, data in files(output).items() if name != "scores.sqlite"}


def images_of(folder: Path, prompts: int, each: int, seed: int = 0, size: int = 16) -> Path:
    """Images that another program drew: `each` of every prompt in shades of grey, with a table of their prompts."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(prompts * each):
        shade = int(np.random.default_rng([seed, number]).integers(0, 256))
        picture = Image.new("RGB", (size, size), (shade,) * 3)
        picture.putpixel((0, 0), (number % 256, seed, 7))  # no two are equal
        picture.save(folder / f"{number:03d}.png")
        lines.append(
            json.dumps({"file": f"{number:03d}.png", "prompt": f"prompt {number // each}", "seed": number % each})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder

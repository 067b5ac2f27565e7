"""Pairs whose images are not square, in folders, and runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.help.worlds import draw, encode

# (width, height) of win and lose. At 32 pixels, in steps of 8, the shapes are 40 x 24, 32 x 32 and 24 x 40.
SHAPES = [
    ((80, 48), (80, 48)), ((32, 32), (32, 32)), ((30, 60), (24, 40)), ((64, 36), (40, 30)), ((32, 32), (40, 36)),
    ((48, 80), (24, 60)), ((90, 30), (50, 20)),
]  # fmt: skip


def make_shapes(folder: Path, n: int = 7) -> str:
    """Folders w/ and l/ of n pairs with SHAPES in turn; the folder."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        for side, good, size in zip(("w", "l"), (True, False), SHAPES[i % len(SHAPES)], strict=True):
            (folder / side).mkdir(parents=True, exist_ok=True)
            (folder / side / f"{i:03d}.png").write_bytes(encode(draw(rng, good, size), "png"))
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "caption": f"caption {i % 5}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)

"""The pairs of the second taste: each is one drawing of the first taste's pairs, with two amounts of its detail."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dpo.tiny import paths
from dpo.tiny.detail import SLOPE, blurred, taste_a
from dpo.tiny.making import pairs

AMOUNTS = (-0.8, 1.2)  # of its detail, added to a drawing: from a fifth of it to a bit more than twice
KINDS = {"train": paths.train_pairs_path, "validation": paths.validation_pairs_path}


def rendition(picture: Image.Image, amount: float) -> Image.Image:
    """The picture with `amount` times its detail added: -1 takes it away, 0 changes nothing."""
    whole = np.asarray(picture, np.float32)
    return Image.fromarray((whole + amount * (whole - blurred(picture))).round().clip(0, 255).astype(np.uint8))


def write(folder: Path) -> dict[str, dict[str, float]]:
    """Writes train.parquet and validation.parquet, Pick-a-Pic v2 tables, the same for the same Pillow and pyarrow.

    kind -> figures that describe its labels.
    """
    figures = {}
    for number, (kind, place) in enumerate(KINDS.items()):
        rows = pq.read_table(place(), columns=["caption", "jpg_0"]).to_pylist()
        rng = np.random.default_rng((13, number))
        sides = []
        for amounts in rng.uniform(*AMOUNTS, (2, len(rows))):
            drawings = (Image.open(io.BytesIO(row["jpg_0"])).convert("RGB") for row in rows)
            made = [rendition(drawing, amount) for drawing, amount in zip(drawings, amounts, strict=True)]
            sides.append([pairs.jpeg(np.asarray(picture)) for picture in made])
        first, second = sides
        scores = scored(first), scored(second)
        captions = [row["caption"] for row in rows]
        name = f"detail {kind}"
        table, figures[kind] = pairs.table(name, captions, first, second, scores, rng, SLOPE, least=0)
        pairs.write(table, folder / f"{kind}.parquet")
    return figures


def scored(files: list[bytes]) -> np.ndarray:
    """[N] by taste a, of pictures as they are stored."""
    return np.array([taste_a(Image.open(io.BytesIO(file))) for file in files])

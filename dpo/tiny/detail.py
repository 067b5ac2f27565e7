"""A second taste for the embedded world, which lives in fine detail: outline and texture.

    python -m dpo.tiny.detail --output detail        its pairs, to train on and held out, as Pick-a-Pic v2 tables

    python -m dpo.train --preset tiny --data detail/train.parquet --validation-data detail/validation.parquet \\
        --evaluate tiny-detail-b tiny-b-faithful

The first taste (world.py) likes what the noisy end of the clock decides: style, backdrop, size. Here both pictures of a
pair are one drawing of the first taste's pairs, with its detail weakened or strengthened by two amounts, so that
nothing that the noisy end decides tells them apart. Taste a likes detail; the pairs are labelled by it, as noisily as
the first ones are. Taste b measures something else that grows with detail; it labelled nothing and is kept for figures.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dpo.common import command, console
from dpo.common.errors import UserError
from dpo.tiny import paths

RADIUS = 2  # pixels: what a Gaussian blur of this deviation takes away is detail; half a latent of the pipeline
AMOUNTS = (-0.8, 1.2)  # of its detail, added to a drawing: from a fifth of it to a bit more than twice
SLOPE = 8.0  # of the Bradley-Terry draw that labels pairs by taste a: 86 % of labels agree with it, as in the first taste
STEEPEST = 95  # percentile of the steps between neighbours that taste b looks at
LEAST = 1e-3  # grey levels that a picture without any detail has
KINDS = {"train": paths.train_pairs_path, "validation": paths.validation_pairs_path}

log = logging.getLogger("dpo.tiny")


def blurred(picture: Image.Image) -> np.ndarray:
    """A picture without its detail, float32 of its shape."""
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(RADIUS)), np.float32)


def rendition(picture: Image.Image, amount: float) -> Image.Image:
    """The picture with `amount` times its detail added: -1 takes it away, 0 changes nothing."""
    whole = np.asarray(picture, np.float32)
    return Image.fromarray((whole + amount * (whole - blurred(picture))).round().clip(0, 255).astype(np.uint8))


def taste_a(picture: Image.Image) -> float:
    """Log of the detail's mean size in grey levels: 0.1 more is a tenth more detail."""
    grey = picture.convert("L")
    return float(np.log(np.abs(np.asarray(grey, np.float32) - blurred(grey)).mean() + LEAST))


def taste_b(picture: Image.Image) -> float:
    """Log of how steep the outlines are: the 95th percentile of the step from a pixel to its neighbours, in grey levels."""
    grey = np.asarray(picture.convert("L"), np.float32)
    steps = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    return float(np.log(np.percentile(steps, STEEPEST) + LEAST))


def write(folder: Path) -> None:
    """train.parquet and validation.parquet in `folder`, the same for the same versions of Pillow and pyarrow."""
    import pyarrow.parquet as pq

    from dpo.tiny.making import pairs

    for number, (kind, place) in enumerate(KINDS.items()):
        rows = pq.read_table(place(), columns=["caption", "jpg_0"]).to_pylist()
        rng = np.random.default_rng((13, number))
        sides = []
        for amounts in rng.uniform(*AMOUNTS, (2, len(rows))):
            drawings = (Image.open(io.BytesIO(row["jpg_0"])).convert("RGB") for row in rows)
            made = [rendition(drawing, amount) for drawing, amount in zip(drawings, amounts, strict=True)]
            sides.append([pairs.jpeg(np.asarray(picture)) for picture in made])
        scores = [np.array([taste_a(Image.open(io.BytesIO(file))) for file in files]) for files in sides]
        captions = [row["caption"] for row in rows]
        table, figures = pairs.table(f"detail {kind}", captions, *sides, (scores[0], scores[1]), rng, SLOPE, least=0)
        pairs.write(table, folder / f"{kind}.parquet")
        log.info("%s: %d pairs, %.0f %% of labels as the taste has it", folder / f"{kind}.parquet", figures["pairs"],
                 100 * figures["labels_agree_with_score"])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the pairs are written, 2 after a mistake of the user's."""
    return command.run("dpo.tiny.detail", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)


def _command(argv: Sequence[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m dpo.tiny.detail", description=__doc__, formatter_class=layout)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.parquet and validation.parquet")
    parser.add_argument("--overwrite", action="store_true", help="also where they are there already")
    given = parser.parse_args(list(argv))
    console.setup()
    for kind in KINDS:
        if (path := given.output / f"{kind}.parquet").exists() and not given.overwrite:
            raise UserError(f"{path} is there already: --overwrite, or another --output")
    write(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

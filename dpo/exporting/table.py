"""What an extraction holds and what not: lines for the terminal by block, and a table by layer as CSV."""

from __future__ import annotations

import csv
import io
from itertools import groupby
from statistics import median

from dpo.common.words import counted, number_of
from dpo.exporting.extracting import SHARES, Extraction, Row, noisy

NOISE = 0.95  # share of the squared change that is looked for where nobody says one
SUMMED = 1e-12  # what summing in float64 may take from a share: all of it may be a little less than 1


def block(layer: str) -> str:
    """The block of a layer, such as down_blocks.1."""
    words = layer.split(".")
    return words[0] if words[0] == "mid_block" else ".".join(words[:2])


def lines(found: Extraction, energy: float | None) -> list[str]:
    """The terminal's lines: blocks, what is held of the whole, what is left out, and how far rounding goes."""
    head = ["block", "layers", "change", *[f"rank {share:.0%}" for share in SHARES], "rank", "kept", "rounding"]
    shown = [head, *[_summary(name, list(rows)) for name, rows in groupby(found.rows, lambda row: block(row.layer))]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    told = [_aligned(row, widths) for row in shown]
    told += [
        f"The LoRA holds {found.kept:.2%} of the squared change of the denoiser; its error is {_error(found):.1%} of the change's size."
    ]
    for what, squared in found.left.items():
        told.append(f"The LoRA leaves out {what}: {squared / found.total:.2%} of the squared change.")
    if fewer := [row for row in found.rows if energy is not None and row.kept < energy - SUMMED]:
        told.append(
            f"{counted(len(fewer), 'layer keeps', 'layers keep')} less than {energy:.0%}: --max-rank cut "
            f"{'it' if len(fewer) == 1 else 'them'} off."
        )
    if rough := noisy(found.rows, NOISE if energy is None else energy):
        told.append(
            f"In {number_of(len(rough), 'layers')} rounding to half precision or fp32 is as large as what may be left out: higher ranks "
            "there hold noise; extract from files in fp32."
        )
    return told


def _aligned(row: list[str], widths: list[int]) -> str:
    """The cells of a line, the first to the left."""
    first, *rest = row
    return "  ".join(
        [first.ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]]
    )


def _error(found: Extraction) -> float:
    return max(0.0, 1 - found.kept) ** 0.5


def _summary(name: str, rows: list[Row]) -> list[str]:
    """Medians over the layers of a block; what is kept, of all of them together."""
    squared = sum(row.squared for row in rows)
    ranks = [str(round(median(row.ranks[i] for row in rows))) for i in range(len(SHARES))]
    return [
        name,
        str(len(rows)),
        f"{median(row.relative for row in rows):.1e}",
        *ranks,
        str(round(median(row.rank for row in rows))),
        f"{sum(row.kept * row.squared for row in rows) / squared:.1%}",
        f"{median(row.floor for row in rows):.0e}",
    ]


def table(found: Extraction) -> str:
    """A line a layer, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"rank_{round(share * 100)}" for share in SHARES]
    writer.writerow(["layer", "shape", "relative_change", *names, "rank", "kept", "squared_change", "rounding"])
    for row in found.rows:
        shape = "x".join(map(str, row.shape))
        writer.writerow(
            [
                row.layer,
                shape,
                f"{row.relative:.6g}",
                *row.ranks,
                row.rank,
                f"{row.kept:.8f}",
                f"{row.squared:.8g}",
                f"{row.floor:.6g}",
            ]
        )
    return text.getvalue()

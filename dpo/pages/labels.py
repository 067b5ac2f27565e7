"""pairs.html and margins.png of a labelled set: how far the scores of its pairs are apart, and the pairs at either end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dpo.common.files import AGAIN, write_whole, writing
from dpo.pages.charts import LIGHT
from dpo.pages.plots import SIZE, STYLE, svg
from dpo.pages.report import Tile, data_uri, template

PAGE, HISTOGRAM = "pairs.html", "margins.png"
BINS = 40
SMALL = 256  # pixels of the side of a picture
TITLE = "Differences of the scores"


class Cell(NamedTuple):
    """A pair on the page: its caption, what is said of it, and its images with their labels, the preferred one first."""

    caption: str
    said: str
    images: Sequence[tuple[str, Image.Image]]


def write_histogram(path: Path, apart: np.ndarray, margin: float) -> None:
    """A PNG of the differences [n], first image less second; ties lie between the dashed lines. Raises UserError."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * 1.5, SIZE[1] * 1.5))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(apart, margin)(axes)
        axes.set_title(TITLE, fontweight="bold")
        figure.tight_layout()
        with writing(path, AGAIN):
            write_whole(path, lambda part: figure.savefig(part, format="png", dpi=130, facecolor="white"))


def _draw(apart: np.ndarray, margin: float) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.hist(apart, bins=BINS, color=LIGHT["policy"])
        for place in (-margin, margin) if margin else (0.0,):
            axes.axvline(place, color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlabel("score of the first image less the second's")
        axes.set_ylabel("pairs")

    return draw


def render(
    found: Mapping[str, Any], sentences: Sequence[str], groups: Sequence[tuple[str, Sequence[Cell]]], apart: np.ndarray
) -> str:
    """The page, as HTML without script or network.

    found: the figures of summary.json; groups: (title, pairs); apart: [n] differences.
    """
    return template("labels.html").render(
        title="Labels from scores",
        sentences=list(sentences),
        tiles=_tiles(found),
        scorers=found["scorers"],
        chart=Markup(svg("margins", TITLE, _draw(apart, found["margin"]))),
        groups=as_shown(groups),
    )


def as_shown(groups: Sequence[tuple[str, Sequence[Cell]]]) -> list[dict[str, Any]]:
    """Groups of pairs (title, pairs) as cells.html has them, with small pictures."""
    return [
        {
            "title": title,
            "cells": [
                one._asdict() | {"images": [(text, _small(image)) for text, image in one.images]} for one in cells
            ],
        }
        for title, cells in groups
    ]


def _small(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((SMALL, SMALL))
    return data_uri(image)


def _tiles(found: Mapping[str, Any]) -> list[Tile]:
    tiles = [
        Tile("Pairs", f"{found['pairs']:,}", f"of {found['captions']:,} captions"),
        Tile("Ties", f"{found['ties']:,}", f"differences up to {found['margin']:g}"),
    ]
    if agreed := found["agreement_with_old_labels"]:
        low, high = agreed["interval"]
        tiles.append(Tile("Agreement", f"{agreed['share']:.0%}", f"with the old labels, {low:.0%} to {high:.0%}"))
    if found["labels"] == "soft":
        tiles.append(Tile("Probability", f"{found['mean_p_of_preferred']:.2f}", "of the preferred image, on average"))
    return tiles

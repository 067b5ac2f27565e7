"""What was made: summary.json, a histogram of the differences, a page with the surest and the least sure pairs, README.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.common.errors import UserError
from dpo.common.files import AGAIN, sweep, write_text
from dpo.common.words import counted, number_of, well_formed
from dpo.data.pairs import BadImage
from dpo.data.writing import Layout
from dpo.evaluating.scoring import to_score
from dpo.labelling import scale
from dpo.labelling.items import Item
from dpo.pages import labels as pages

SUMMARY = "summary.json"
FILES = (SUMMARY, pages.HISTOGRAM, pages.PAGE)
SHOWN = 9  # pairs of different captions of either kind on the page
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Made:
    """Labels of n pairs, and what they were made from."""

    scorers: Sequence[Mapping[str, Any]]
    rows: int  # pairs of the set, with those that have no label
    apart: np.ndarray  # [n] differences of the scores; nan where an image has none
    label_0: np.ndarray  # [n] 0, 0.5, 1 or nan
    p: np.ndarray  # [n]
    old: np.ndarray  # [n] older labels in [0, 1], nan where there is none
    captions: np.ndarray  # [n] int64 keys
    temperature: float | None  # of soft labels
    own_temperature: float | None
    margin: float
    fitting: Mapping[str, Any] | None
    item: Callable[[int, int], Item]  # of a row and a side

    def figures(self) -> dict[str, Any]:
        """Everything that can be said in numbers, in JSON's own types."""
        known = np.isfinite(self.label_0)
        apart, ties = np.abs(self.apart[known]), self.label_0[known] == 0.5
        agreed = scale.agreement(self.label_0, self.old, self.captions)
        return {
            "rows": self.rows,
            "pairs": int(known.sum()),
            "captions": len(np.unique(self.captions[known])),
            "without_a_score": int((~known).sum()),
            "ties": int(ties.sum()),
            "first_preferred": int((self.label_0[known] == 1.0).sum()),
            "agreement_with_old_labels": None if agreed is None else asdict(agreed),
            "labels": "hard" if self.temperature is None else "soft",
            "temperature": self.temperature,
            "own_temperature": self.own_temperature,
            "fitted": self.fitting,
            "margin": self.margin,
            "difference": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(apart, QUANTILES), strict=True)},
            "mean_p_of_preferred": float(np.maximum(self.p[known], 1 - self.p[known]).mean()),
            "scorers": [dict(one) for one in self.scorers],
        }

    def extremes(self, surest: bool) -> list[int]:
        """The rows with the largest differences, or the smallest, of different captions."""
        known = np.flatnonzero(np.isfinite(self.label_0))
        size = np.abs(self.apart[known])
        order = known[np.argsort(-size if surest else size, kind="stable")]
        _, first = np.unique(self.captions[order], return_index=True)
        return order[np.sort(first)][:SHOWN].tolist()


def write(folder: Path, made: Made) -> None:
    """Writes summary.json, the histogram and the page. Raises UserError where they cannot be written."""
    for name in FILES:
        sweep(folder, name)
    figures = made.figures()
    write_text(folder / SUMMARY, json.dumps(figures, indent=1, ensure_ascii=True, allow_nan=False), AGAIN)
    pages.write_histogram(folder / pages.HISTOGRAM, made.apart[np.isfinite(made.apart)], made.margin)
    groups = [
        (title, [_cell(made, row) for row in made.extremes(surest)])
        for title, surest in (("The surest pairs", True), ("The least sure pairs", False))
    ]
    page = pages.render(figures, lines(made), groups, made.apart[np.isfinite(made.apart)])
    write_text(folder / pages.PAGE, well_formed(page), AGAIN)


def _cell(made: Made, row: int) -> pages.Cell:
    items = [made.item(row, side) for side in (0, 1)]
    try:
        shown = [to_score(item.image.load()) for item in items]
    except BadImage as error:
        raise UserError(
            f"{error}: the image could be read when it was scored; put it back, then start the same command again"
        ) from error
    order = (0, 1) if made.label_0[row] >= 0.5 else (1, 0)
    p = max(float(made.p[row]), 1 - float(made.p[row]))
    tie = made.label_0[row] == 0.5
    return pages.Cell(
        items[0].caption,
        f"{'a tie; ' if tie else ''}difference {abs(float(made.apart[row])):.3g}"
        + (f", p {p:.3f}" if made.temperature else ""),
        [
            ("as good" if tie else "preferred" if place == 0 else "other", shown[side])
            for place, side in enumerate(order)
        ],
    )


def lines(made: Made) -> list[str]:
    """What a person should know of the labels, a sentence each."""
    found = made.figures()
    by = ", ".join(one["name"] for one in found["scorers"])
    said = [
        f"{number_of(found['pairs'], 'pairs', ',')} of {number_of(found['captions'], 'captions', ',')} labelled by {by}: "
        f"{number_of(found['ties'], 'ties', ',')}, {number_of(found['without_a_score'], 'rows', ',')} left out without a score"
    ]
    if agreed := found["agreement_with_old_labels"]:
        low, high = agreed["interval"]
        said.append(
            f"Agreement with the old labels: {agreed['share']:.3f} ({low:.3f} to {high:.3f}) of "
            f"{counted(agreed['pairs'], 'pair that is', 'pairs that are', ',')} no tie in either"
        )
    if found["labels"] == "soft":
        said.append(
            f"Soft labels: p = sigmoid({found['temperature']:.4g} x difference), on average {found['mean_p_of_preferred']:.3f} for "
            "the preferred image"
        )
    if fit := found["fitted"]:
        said.append(
            f"Temperature fitted on {fit['pairs']:,} pairs; mean log-likelihood of {fit['held_out']:,} held-out ones: "
            f"{fit['before']:.4f} before, {fit['after']:.4f} after, {fit['sure']:.4f} with hard labels, all as sure"
        )
    return said


def write_readme(path: Path, made: Made, layout: Layout) -> None:
    """README.md, in whose head `datasets` finds the parquet files. Raises UserError where it cannot be written."""
    head = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---\n"
    )
    columns = {
        "pickapic": "The columns of Pick-a-Pic v2; `label_0` and `label_1` hold 0, 0.5 or 1,",
        "chosen-rejected": "Columns `prompt`, `chosen`, `rejected`,",
    }[layout]
    text = (
        f"# Preference pairs labelled by a scorer\n\n{columns} and `p` is the probability of the preference. Provenance: the scorer and "
        "the fingerprint of its weights, the scores of both images, older labels where there were any, and the hash of the "
        "protocol, which `label.json` has whole.\n\n" + "".join(f"- {line}\n" for line in lines(made))
    )
    write_text(path, head + text, AGAIN)

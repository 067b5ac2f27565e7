"""evaluation.html and evaluation.md: is it better, by how much and how surely, from evaluation.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import UndefinedError
from markupsafe import Markup
from matplotlib.axes import Axes
from PIL import Image

from dpo.common.errors import OF_READING, UserError, reading
from dpo.common.files import AGAIN, write_text
from dpo.common.words import first_line, printable, well_formed
from dpo.pages.better import Entry, verdict
from dpo.pages.charts import LIGHT
from dpo.pages.figures import DECILES
from dpo.pages.markdown import cell, table
from dpo.pages.plots import SIZE, svg
from dpo.pages.report import Tile, data_uri, template

PAGE, TABLE = "evaluation.html", "evaluation.md"
LABEL = 40  # characters of a scorer's name in a chart
OF_CONTENT = (  # what a changed evaluation.json makes of its reading
    AttributeError, LookupError, TypeError, ValueError, ArithmeticError, StopIteration, UndefinedError, RecursionError,
)  # fmt: skip
SMALL = 256  # pixels of the side of a picture in the page's rows; a click shows it as it is


class Row(NamedTuple):
    """A line of the table of figures, as texts."""

    side: str
    scorer: str
    base: str
    other: str
    difference: str
    win_rate: str
    p: str


class SetRow(NamedTuple):
    """A line of the table of what all images of a side score together, as texts."""

    side: str
    scorer: str
    value: str
    difference: str
    better: str


def write_pages(path: Path) -> list[Path]:
    """Writes page and table beside an evaluation.json; their paths. Raises UserError where that is none."""
    with reading(str(path), "run python -m dpo.evaluate again"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("results"), list):
        raise UserError(f"{path} is no evaluation: run python -m dpo.evaluate again")
    page, lines = path.with_name(PAGE), path.with_name(TABLE)
    try:
        texts = {lines: markdown(found), page: render(found)}
    except OF_CONTENT as error:
        raise UserError(
            f"{path} is no evaluation of this version ({type(error).__name__}: {first_line(error)}): run python -m "
            "dpo.evaluate again"
        ) from error
    for place, text in texts.items():
        write_text(place, well_formed(text), AGAIN)
    return [page, lines]


def rows(found: Entry) -> list[Row]:
    """The table of figures, one row for each side and scorer."""
    return [_row(entry) for entry in found["results"]]


def _row(entry: Entry) -> Row:
    paired = entry["paired"]
    difference = _with_interval(f"{paired['difference']:+.4g}", paired["difference_interval"], "+.4g")
    first, last = paired["win_interval"]
    ties = f", {paired['ties']:.0%} ties" if paired["ties"] else ""
    return Row(
        entry["side"],
        entry["scorer"],
        f"{paired['mean_a']:.4g} ({paired['median_a']:.4g})",
        f"{paired['mean_b']:.4g} ({paired['median_b']:.4g})",
        difference,
        f"{paired['win_rate']:.3f} ({first:.3f} to {last:.3f}){ties}",
        f"{entry['p']:.2g}",
    )


def set_rows(found: Entry) -> list[SetRow]:
    """The table of scores of whole sets, one row for each side and scorer; the base has no difference."""
    lower = {one["name"] for one in found["scorers"] if not one.get("higher_is_better", True)}
    return [
        SetRow(
            entry["side"],
            entry["scorer"],
            _with_interval(f"{entry['value']:.4g}", entry["interval"], ".4g"),
            "" if apart is None else _with_interval(f"{apart:+.4g}", entry.get("difference_interval"), "+.4g"),
            "lower" if entry["scorer"] in lower else "higher",
        )
        for entry in found.get("sets") or []
        for apart in [entry.get("difference")]
    ]


def _with_interval(text: str, interval: Sequence[float] | None, form: str) -> str:
    return text if interval is None else f"{text} ({interval[0]:{form}} to {interval[1]:{form}})"


def _at_best(found: Entry) -> list[tuple[str, str, str, Row]]:
    """(side, scorer, name of the base, figures) of every comparison with the base at its best guidance."""
    entries = [entry for entry in found["results"] if (entry.get("best_guidance") or {}).get("paired")]
    return [
        (entry["side"], entry["scorer"], at["base"], _row({**entry, "paired": at["paired"]}))
        for entry in entries
        for at in [entry["best_guidance"]]
    ]


def markdown(found: Entry) -> str:
    """The figures as a Markdown table, with what they were measured on."""
    base = found["sides"][0]["name"]
    head = Row("model", "scorer", f"{base}, mean (median)", "its own", "difference", "win rate", "p (Holm)")
    of_sets = SetRow("images", "score of the whole set", "value", f"difference to {base}", "better")
    said = " ".join(f"{verdict(found, name).headline}" for name in _others(found))
    about = "; ".join(f"{name}: {value}" for name, value in protocol(found))
    tables = [
        table(head, rows(found)),
        _best(found),
        table(of_sets, set_rows(found)),
        *_ranked(found),
        _published(found),
    ]
    parts = [cell(said), *tables, *map(cell, [about, *found.get("warnings", [])])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _best(found: Entry) -> str:
    """The comparison with the base at its best guidance, as a table; empty where it was drawn with one."""
    lines = [(side, scorer, base, row.difference, row.win_rate) for side, scorer, base, row in _at_best(found)]
    return table(("model", "scorer", "base at its best guidance", "difference", "win rate"), lines)


def _ranked(found: Entry) -> list[str]:
    """The implicit preference accuracy of each side on labelled pairs, whole and by decile, as tables; empty where none was asked for."""
    ranked = found.get("accuracy") or []
    lines = [(one["side"], _accuracy(one), str(one["pairs"])) for one in ranked]
    head = ("model", "implicit preference accuracy", "pairs")
    return [table(head, lines), table(("accuracy by tenth of the clock", *TENTHS), by_tenth(found))]


TENTHS = tuple(f"{10 * k} to {10 * k + 10} %" for k in range(DECILES))  # of the timesteps, from the cleanest on


def _accuracy(one: Entry) -> str:
    return f"{one['accuracy']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"


def by_tenth(found: Entry) -> list[list[str]]:
    """The implicit accuracy of each side by tenth of the timesteps, as texts; empty where nothing was drawn."""
    return [
        [one["side"], *("" if part is None else f"{part:.2f}" for part in one.get("deciles") or [])]
        for one in found.get("accuracy") or []
    ]


def _published(found: Entry) -> str:
    """One's own figures beside a published table's; empty where none was asked for."""
    published = found.get("published", {"title": "published", "lines": []})
    lines = [
        (
            one["model"],
            one["scorer"],
            f"{one['ours']:.4g}",
            str(one["published"]),
            f"{one['difference']:+.3g}",
            "not known" if one["tolerance"] is None else f"{one['tolerance']:.3g}",
        )
        for one in published["lines"]
    ]
    return table(("model", "scorer", "ours", published["title"], "difference", "apart in two papers"), lines)


def _others(found: Entry) -> list[str]:
    return list(dict.fromkeys(entry["side"] for entry in found["results"]))


def protocol(found: Entry) -> list[tuple[str, str]]:
    """How the images of the base were made, by field; what is not known is named so."""
    if not found["results"] and not found.get("sets"):
        return [("images", "none were needed")]
    known = found["sides"][0].get("protocol")
    if not known:
        return [("protocol", "not known: the images were drawn by another program")]
    return [(name.replace("_", " "), _value(value)) for name, value in known.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items() if item is not None)
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def render(found: Entry) -> str:
    """The page, as HTML without script or network."""
    pictures = _Pictures()
    sides = [
        {
            "name": name,
            "verdict": verdict(found, name),
            "tiles": _tiles(found, name),
            "chart": Markup(
                svg(
                    f"win{number}",
                    f"Win rates of {name}",
                    _wins(found, name),
                    (SIZE[0], _height(found, name)),
                    left=0.36,
                )
            ),
            "examples": _examples(found, name, pictures),
            "categories": _categories(found, name),
        }
        for number, name in enumerate(_others(found))
    ]
    return template("evaluation.html").render(
        title=_title(found),
        base=found["sides"][0]["name"],
        sides=sides,
        rows=rows(found),
        scorers=found["scorers"],
        protocol=protocol(found),
        everyone=found["sides"],
        sets=set_rows(found),
        accuracy=[(one["side"], _accuracy(one), one["pairs"]) for one in found.get("accuracy") or []],
        tenths=TENTHS,
        by_tenth=by_tenth(found),
        published=found.get("published"),
        at_best=_at_best(found),
        warnings=found.get("warnings") or [],
        made=[(name, _value(value)) for name, value in (found.get("made") or {}).items()],
        large=pictures.large,
    )


def _title(found: Entry) -> str:
    base = found["sides"][0]["name"]
    scored = found["results"] or found.get("sets")
    return f"Is it better than {base}?" if scored else f"Whose preferences it has, beside {base}"


def _tiles(found: Entry, side: str) -> list[Tile]:
    entries = [entry for entry in found["results"] if entry["side"] == side]
    return [
        Tile(
            f"Win rate by {entry['scorer']}",
            f"{entry['paired']['win_rate']:.0%}",
            f"{entry['paired']['win_interval'][0]:.0%} to {entry['paired']['win_interval'][1]:.0%}; no change: 50%",
        )
        for entry in entries
    ] + [
        Tile(f"Worth by {entry['scorer']}", entry["worth"]["text"], "the base's best of so many images is as good")
        for entry in entries
        if entry.get("worth")
    ]


def _height(found: Entry, side: str) -> float:
    """Inches of the chart of win rates: a line for each scorer."""
    return 1.1 + 0.42 * sum(entry["side"] == side for entry in found["results"])


def _wins(found: Entry, side: str) -> Callable[[Axes], None]:
    """Draws the win rate of a side with its interval, one line a scorer; a dashed line marks one half."""
    entries = [entry for entry in found["results"] if entry["side"] == side][::-1]

    def draw(axes: Axes) -> None:
        for place, entry in enumerate(entries):
            low, high = entry["paired"]["win_interval"]
            axes.plot([low, high], [place, place], color=LIGHT["policy"], linewidth=2.5)
            axes.plot([entry["paired"]["win_rate"]], [place], "o", color=LIGHT["policy"], markersize=7)
        axes.axvline(0.5, color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(entries) - 0.4)
        names = [printable(entry["scorer"])[:LABEL] for entry in entries]
        axes.set_yticks(range(len(entries)), names, parse_math=False)
        axes.set_xlabel("win rate (a tie counts one half)")

    return draw


def _categories(found: Entry, side: str) -> list[tuple[str, list[str]]]:
    """Win rates by category and scorer, as texts; empty without categories."""
    entries = [entry for entry in found["results"] if entry["side"] == side]
    kinds = sorted({kind for entry in entries for kind in entry["categories"]})
    return [
        (
            kind,
            [
                f"{one['win_rate']:.2f} ({one['win_interval'][0]:.2f} to {one['win_interval'][1]:.2f})" if one else ""
                for one in (entry["categories"].get(kind) for entry in entries)
            ],
        )
        for kind in kinds
    ]


class _Pictures:
    """Pictures of a page: small in its rows, and each once more as large as it is, which a click shows."""

    def __init__(self) -> None:
        self.large: list[tuple[str, str]] = []  # (id, data URI)
        self._known: dict[str, tuple[str, str] | None] = {}

    def of(self, path: str) -> tuple[str, str] | None:
        """(id, data URI of the small one); None for a file that is gone or is no image."""
        if path not in self._known:
            self._known[path] = self._read(path)
        return self._known[path]

    def _read(self, path: str) -> tuple[str, str] | None:
        try:
            if not Path(path).is_file():  # a pipe would wait for ever
                return None
            with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as opened:
                image = opened.convert("RGB")
        except (*OF_READING, SyntaxError, Image.DecompressionBombError):
            return None
        name = f"picture-{len(self.large)}"
        self.large.append((name, data_uri(image)))
        image.thumbnail((SMALL, SMALL))
        return name, data_uri(image)


def _examples(found: Entry, side: str, pictures: _Pictures) -> list[dict[str, Any]]:
    """The prompts with the largest gains and losses of a side by its first scorer, with both images."""
    entry = next(entry for entry in found["results"] if entry["side"] == side)
    shown = []
    for name in ("gains", "losses"):
        cells = []
        for prompt, difference, base, other in entry[name]:
            images = [(label, pictures.of(path)) for label, path in (("before", base), ("after", other))]
            if all(image for _, image in images):
                cells.append({"prompt": prompt, "difference": f"{difference:+.3g}", "images": images})
        if cells:
            shown.append({"title": f"Largest {name} by {entry['scorer']}", "cells": cells})
    return shown


def headline(found: Entry) -> Sequence[str]:
    """The verdicts of all sides and the scores of their whole sets, a line each, for the console."""
    verdicts = [verdict(found, name) for name in _others(found)]
    return (
        [" ".join([judged.headline, *judged.sentences]) for judged in verdicts]
        + [
            f"{row.scorer} of all images of {row.side}: {row.value}"
            + (f", {row.difference} to {found['sides'][0]['name']} ({row.better} is better)" if row.difference else "")
            for row in set_rows(found)
        ]
        + [
            f"implicit preference accuracy of {one['side']} against {found['sides'][0]['name']}: {_accuracy(one)} on {one['pairs']:,} pairs"
            for one in found.get("accuracy") or []
        ]
    )

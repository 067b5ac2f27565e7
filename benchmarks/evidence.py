"""The study's finished cells as a page: both tastes, where they live, the correction table, a figure."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.claims import FIRST, SECOND, against_dpo, check, gain, table_of
from benchmarks.measuring import markdown
from benchmarks.study_rows import DETAIL, QUARTERS, SEGMENTS, TABLED, Cell, Cells
from dpo.pages.figures import DECILES

INTRODUCTION = """\
# Evidence from the embedded world

Each row aligns the shipped pipeline with pairs of the embedded world (`--preset tiny`: 100 updates of 16 pairs, but for one row of 600;
the flags are in `benchmarks/study_rows.py`), then draws the report prompts with the unchanged and the aligned UNet from the same noise;
a judge that labelled nothing compares them. Settings were chosen on other prompts and the first taste, for `dpo` and `dde-single` only;
the other rows take theirs from these or have their method's defaults, so a row that is behind may be behind for want of tuning. A win
rate means little without the share of captions that are still obeyed beside it; and since a prompt is won by however little, it tells
direction rather than size: the size is how much the judge's mean score rose. Two updates at learning rate 1e-12 are judged 0.500. The
interval of a row is that of the prompts around the mean over seeds (all seeds share the prompts); what else stands behind ± in a row
is the deviation over the seeds. A difference has its 95 % interval over the seeds (Student's t, each seed of one row less the same seed
of the other), which tells of other seeds and not of other prompts; *undecided* means that nothing is within it. Of comparisons between
equals one in twenty comes out as decided, by luck, and here are many. The figures of every run are in `{cells}`;
`python -m benchmarks.study --cells {cells} --report {report}` runs what is missing there and writes this page.
"""
FIRST_NOTE = """\
The pairs are the shipped ones, which the base model drew; the hidden taste likes pictures in 3D, plain backdrops and large objects. The
score is the second judge's, from 0 to 3."""
SECOND_NOTE = """\
Both pictures of a pair are one drawing of the first taste's pairs, with its fine detail weakened or strengthened (`python -m
dpo.tiny.build --detail DIR`); the hidden taste likes detail. The score is the logarithm of how steep the outlines are beside the picture's
contrast, so 0.1 is a tenth steeper; captions obeyed are the second judge's. Beta is that of the first taste; the rows of other betas tell
how much of a difference it makes here."""
WHERE_NOTE = """\
*Told apart*: how often the best observer of a noised picture says rightly which one of its pair it was (exact, of the pairs' latents; one
half is guessing). The pictures of the first taste differ in what noise hides last, those of the second in what it hides first. *d*: the
share of a tenth in what margins are made of, how much more the policy lowered the error of the winner than that of the loser, in the last
quarter of a run of `dpo` (mean over the seeds that kept it; how many is in brackets). *Rises by*: the judge's mean score
after a run of `dpo` on this tenth of the timesteps alone. The weights are shared by all timesteps, and where d
is large the logit saturates: a run on small timesteps alone moves either score
the least, though most of d is there. Beside its own largest rise either taste gains alike from a tenth: detail is hidden by noise first, but
is not learned from smaller timesteps than the first taste is."""
COLUMNS = ["method", "seeds", "win rate", "over seeds", "95 % interval", "lowest bound of a seed", "score"]
COLUMNS += ["captions obeyed before", "captions obeyed after"]
COMPARED = ["seeds", "win rate", "by win rate", "score", "by score"]
WHERE = {  # end of the names of rows -> columns
    taste: [f"{what}, {name}" for what in ("told apart", "d", "rises by")]
    for taste, name in {"": "first", DETAIL: "detail"}.items()
}
TASTES = {  # end of the names of rows -> title, note, claims
    "": ("The first taste: style, backdrop, size", FIRST_NOTE, FIRST),
    DETAIL: ("The second taste: fine detail", SECOND_NOTE, SECOND),
}
TABLE_NOTE = """\
M is the moving average of d by timestep, C(t) its weighted sum over later timesteps; means over the seeds. At 16 pairs an update 50
neighbouring timesteps share an entry, which is drawn in 56 of 100 updates; with rho = 0.95 it looks back over some 20 of them. d is
measured over the last quarter of the run. In the longer run rho is 0.5 and the learning rate falls to 0, so that d stands still at
its end."""


def correction_tables(found: dict[int, Cell]) -> dict[str, np.ndarray]:
    """`table_history` of a row, averaged over its seeds; empty without any."""
    names = [name for name in ("table", "correction", "measured") if all(name in cell for cell in found.values())]
    return {name: np.mean([cell[name] for cell in found.values()], axis=0) for name in names if found}


def write_report(path: Path, results: Cells, cells: Path, apart: dict[str, list[float]]) -> None:
    """The tables as a page, and the figure beside it; `cells` is the file that `results` stand in.

    apart: `told_apart` of the pairs of each taste.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = table_of(results)
    tables = {row: found for row in TABLED if (found := correction_tables(results[row]))}
    text = [INTRODUCTION.format(cells=cells, report=path)]
    for taste, (title, note, claims) in TASTES.items():
        text += [
            f"## {title}",
            "",
            note,
            "",
            markdown([line for line in lines if taste_of(line["method"]) == taste], COLUMNS),
        ]
        text += ["Against `dpo`, seed by seed:", "", markdown(against_dpo(results, taste), ["method", *COMPARED])]
        text += [
            "What the papers say, and what holds here:",
            "",
            markdown([check(one, results) for one in claims], ["claim", *COMPARED]),
        ]
    found = markdown(where(results, apart), ["tenth of t", *WHERE[""], *WHERE[DETAIL]])
    text += ["## Where each taste lives", "", WHERE_NOTE, "", found]
    if tables:
        text += ["## The correction table of stepwise estimation", "", *describe_tables(tables)]
    if any(results.values()):
        text += ["", f"![win rates, segments, correction]({path.with_suffix('.png').name})", ""]
        plot(path.with_suffix(".png"), [line for line in lines if "win rate" in line], results, tables)
    path.write_text("\n".join(text), encoding="utf-8")


def where(results: Cells, apart: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A line for each tenth of the timesteps, as WHERE_NOTE has it."""
    lines: list[dict[str, Any]] = [{"tenth of t": tenth_of(tenth)} for tenth in range(DECILES)]
    for taste, (told, share, rise) in WHERE.items():
        found = [cell["measured"] for cell in results[f"dpo{taste}"].values() if "measured" in cell]
        for tenth, line in enumerate(lines):
            line[told] = f"{apart[taste][tenth]:.2f}"
            if found:
                d = np.mean(found, axis=0)
                line[share] = f"{d[tenth] / d.sum():.1%} ({len(found)})"
            if alone := results[SEGMENTS[tenth] + taste]:
                line[rise] = f"{mean(gain(cell) for cell in alone.values()):+.3f}"
    return lines


def tenth_of(tenth: int) -> str:
    """What a table calls one."""
    return f"{tenth * 10} to {tenth * 10 + 10} %"


def taste_of(row: str) -> str:
    """The key of TASTES."""
    return DETAIL if row.endswith(DETAIL) else ""


def describe_tables(tables: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """d, M and C by tenth of the clock at the end, and how C grew over the run."""
    columns = {
        f"{symbol}, {row}": found[name].reshape(-1, DECILES)[-1]
        for row, found in tables.items()
        for symbol, name in (("d", "measured"), ("M", "table"), ("C", "correction"))
        if name in found
    }
    head = ["tenth of t", *columns]
    lines = [
        {head[0]: tenth_of(tenth)} | {name: values[tenth] for name, values in columns.items()}
        for tenth in range(DECILES)
    ]
    text = [
        TABLE_NOTE,
        "",
        markdown(lines, head),
    ]
    for row, found in tables.items():
        size = np.abs(found["correction"])
        moved = size[-1].mean() / size[-2].mean() - 1
        falls = "falls" if (np.diff(size[-1]) < 0).all() else "does not fall everywhere"
        quarters = ", ".join(f"{value:.3g}" for value in size.mean(1))
        text.append(
            f"- `{row}`: |C| {falls} from tenth to tenth of t ({size[-1, 0]:.3g} in the first, {size[-1, -1]:.3g} in the last); its mean "
            f"after each quarter of the run is {quarters}, the last quarter changed it by {moved:+.0%}."
            + (
                f" M is {found['table'][-1].mean() / found['measured'].mean():.0%} of the d it estimates."
                if "measured" in found
                else ""
            )
        )
    return text


def plot(path: Path, lines: list[dict[str, Any]], results: Cells, tables: dict[str, dict[str, np.ndarray]]) -> None:
    """Win rates beside faithfulness, of each taste; the rise of the score by timestep segment; C(t) as the run goes on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    alone = {segment + taste for segment in SEGMENTS for taste in TASTES}
    shown = {
        taste: [line for line in lines[::-1] if taste_of(line["method"]) == taste and line["method"] not in alone]
        for taste in TASTES
    }
    tall = 2 + 0.22 * max(len(rows) for rows in shown.values())
    figure, axes = pyplot.subplots(1, 4, figsize=(24, tall), layout="constrained")
    *rates, segments, correction = axes
    for axis, (taste, rows) in zip(rates, shown.items(), strict=True):
        _points(axis, rows)
        obeyed = [line["captions obeyed after"] for line in rows]
        axis.plot(obeyed, [line["method"] for line in rows], "x", color="grey", label="captions obeyed after")
        axis.axvline(0.5, color="grey", linewidth=1)
        axis.set_title(TASTES[taste][0])
        axis.set_xlabel("win rate over the unchanged model, 95 % interval")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small")  # beside no row
        rises = {
            100 * tenth + 50: mean(gain(cell) for cell in found.values())
            for tenth, segment in enumerate(SEGMENTS)
            if (found := results[segment + taste])
        }
        if rises:  # the scores are of two kinds, so each is shown beside its own largest rise
            most = max(rises.values())
            shares = [rise / most for rise in rises.values()]
            segments.plot(list(rises), shares, marker="o", label=f"{TASTES[taste][0]} (1: {most:+.3f})")
    segments.axhline(0, color="grey", linewidth=1)
    segments.set_xlabel("t")
    segments.set_ylabel("rise of the score by dpo on a tenth of the timesteps, of the largest")
    segments.legend(fontsize="small")
    if tables:
        row = next(reversed(tables))  # the longest, once it has been run
        for quarter, found in enumerate(tables[row]["correction"], start=1):
            correction.plot(
                np.arange(DECILES) * 100 + 50, found, marker="o", label=f"after {quarter} of {QUARTERS} quarters"
            )
        correction.set_xlabel("t")
        correction.set_ylabel(f"C(t) of {row}")
        correction.axhline(0, color="grey", linewidth=1)
        correction.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(axes: Any, lines: list[dict[str, Any]]) -> None:
    rates = [line["win rate"] for line in lines]
    ends = np.array([[float(end) for end in line["95 % interval"].split(" to ")] for line in lines]).reshape(-1, 2)
    names = [line["method"] for line in lines]
    axes.errorbar(rates, names, xerr=np.abs(ends.T - np.array(rates)), fmt="o", capsize=3, label="win rate")

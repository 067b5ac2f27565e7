"""The study's finished cells as a page: win rates, what the papers claim and what holds, the correction table, a
figure.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring import markdown
from benchmarks.study_rows import DETAIL, METHODS, QUARTERS, SEGMENTS, TABLED, Cell, Cells
from dpo.common.stats import share_interval
from dpo.pages.figures import DECILES

TABLE_NOTE = """\
M is the moving average of d by timestep, C(t) its weighted sum over later timesteps; means over the seeds. At 16 pairs an update 50
neighbouring timesteps share an entry, which is drawn in 56 of 100 updates; with rho = 0.95 it looks back over some 20 of them. d is
measured over the last quarter of the run. In the longer run rho is 0.5 and the learning rate falls to 0, so that d stands still at
its end."""


# Student's two-sided 95 % quantile of so many seeds: with five, two standard errors would call one in nine equals different.
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Claim(NamedTuple):
    """What a paper says: some rows are better, on average, than others."""

    text: str
    better: list[str]
    worse: list[str]

    def on_detail(self) -> Claim:
        """The same of the second taste."""
        return Claim(self.text, *([f"{row}{DETAIL}" for row in rows] for rows in self[1:]))


BOTH = (
    Claim("Diffusion-DPO beats supervised fine-tuning", ["dpo"], ["sft"]),
    Claim("DDE's single-shot weight beats uniform credit", ["dde-single"], ["dpo"]),
    Claim("the whole of DDE beats uniform credit", ["dde"], ["dpo"]),
    Claim("the whole of DDE beats its single-shot weight alone", ["dde"], ["dde-single"]),
    Claim("stepwise estimation alone is weaker than the whole of DDE", ["dde"], ["dde-step"]),
    Claim("uniform credit beats discounted credit", ["dpo"], ["discounted"]),
    Claim("middle segments, [200, 700), beat the outer ones", SEGMENTS[2:7], SEGMENTS[:2] + SEGMENTS[7:]),
)
FIRST = (
    *BOTH,
    Claim(
        "AI feedback (labels of the judge whose taste drew them) beats the noisy labels",
        ["dpo, judged labels"],
        ["dpo"],
    ),
    Claim("t in [200, 700) alone beats all timesteps", ["dpo, t in [200, 700)"], ["dpo"]),
)
SECOND = tuple(claim.on_detail() for claim in BOTH)


def gain(cell: Cell) -> float:
    """How much the mean score of the judge rose."""
    return cell["score_after"] - cell["score_before"]


def win_rate(cell: Cell) -> float:
    """Over the unchanged model."""
    return cell["win_rate"]


def table_of(results: Cells) -> list[dict[str, Any]]:
    """A line per row. All seeds share the prompts, so the interval is that of one set of prompts around the mean over
    seeds.
    """
    lines = []
    for row, by_seed in results.items():
        found = list(by_seed.values())
        line: dict[str, Any] = {"method": row, "seeds": len(found) or "not yet run"}
        if found:
            rates, gains = [win_rate(cell) for cell in found], [gain(cell) for cell in found]
            low, high = share_interval(mean(rates) * found[0]["prompts"], found[0]["prompts"])
            line |= {
                "win rate": mean(rates),
                "over seeds": f"± {stdev(rates):.3f}" if len(rates) > 1 else None,
                "95 % interval": f"{low:.3f} to {high:.3f}",
                "lowest bound of a seed": min(cell["win_rate_interval"][0] for cell in found),
                "score": f"{mean(gains):+.3f}" + (f" ± {stdev(gains):.3f}" if len(gains) > 1 else ""),
                "captions obeyed before": mean(cell["faithfulness_before"] for cell in found),
                "captions obeyed after": mean(cell["faithfulness_after"] for cell in found),
            }
        lines.append(line)
    return lines


def check(claim: Claim, results: Cells) -> dict[str, Any]:
    """The claim against the cells: differences seed by seed, of win rates and of the rise of the score, and a verdict on each."""
    seeds = sorted(set.intersection(*(set(results[row]) for row in claim.better + claim.worse)))
    line: dict[str, Any] = {"claim": claim.text, "seeds": len(seeds) or "not yet run"}
    for name, figure in (("win rate", win_rate), ("score", gain)):
        gaps = [
            mean(figure(results[row][seed]) for row in claim.better)
            - mean(figure(results[row][seed]) for row in claim.worse)
            for seed in seeds
        ]
        if gaps:
            line[name] = f"{mean(gaps):+.3f}"
        if len(gaps) > 1:
            error = T95[len(gaps)] * stdev(gaps) / len(gaps) ** 0.5
            line[name] += f" ± {error:.3f}"
            line[f"by {name}"] = "undecided" if abs(mean(gaps)) <= error else "holds" if mean(gaps) > 0 else "does not hold"
    return line


def against_dpo(results: Cells, taste: str) -> list[dict[str, Any]]:
    """Every method of the study against dpo, on one taste: taste is "" or DETAIL."""
    words = {"holds": "above", "does not hold": "below"}
    lines = []
    for row in METHODS:
        if row != "dpo":
            line = check(Claim(row, [row + taste], [f"dpo{taste}"]), results)
            lines.append({"method": line.pop("claim")} | {name: words.get(value, value) for name, value in line.items()})
    return lines


def correction_tables(found: dict[int, Cell]) -> dict[str, np.ndarray]:
    """`table_history` of a row, averaged over its seeds; empty without any."""
    names = [name for name in ("table", "correction", "measured") if all(name in cell for cell in found.values())]
    return {name: np.mean([cell[name] for cell in found.values()], axis=0) for name in names if found}


def write_report(path: Path, results: Cells, cells: Path) -> None:
    """The tables as a page, and the figure beside it; `cells` is the file that `results` stand in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = table_of(results)
    columns = ["method", "seeds", "win rate", "over seeds", "95 % interval", "lowest bound of a seed"]
    columns += ["captions obeyed before", "captions obeyed after"]
    tables = {row: found for row in TABLED if (found := correction_tables(results[row]))}
    text = [
        "# Evidence from the embedded world",
        "",
        "Each row aligns the shipped pipeline with the shipped pairs (`--preset tiny`: 100 updates of 16 pairs, but for one row of 600; the",
        "flags are in `benchmarks/study_rows.py`), then draws the report prompts with the unchanged and the aligned UNet from the same noise.",
        "The second judge, which labelled nothing, compares them. Settings were chosen on other prompts with the first judge, for `dpo` and",
        "`dde-single` only; the other rows take theirs from these, so a row that is behind may be behind for want of tuning. A win rate means",
        "little without the share of captions that are still obeyed beside it; and since a prompt is won by however little, it tells",
        "direction rather than size. Two updates at learning rate 1e-12 are judged 0.500. The figures of every run are in",
        f"`{cells}`; `python -m benchmarks.study --cells {cells} --report {path}` runs what is missing there and",
        "writes this page.",
        "",
        markdown(lines, columns),
        "The interval is that of the prompts around the mean over seeds (all seeds share the prompts).",
        "",
        "## What the papers say, and what holds here",
        "",
        "Differences are taken seed by seed; *undecided* means within two standard errors of nothing.",
        "",
        markdown(
            [check(claim, results) for claim in CLAIMS],
            ["claim", "seeds", "difference", "standard error", "larger in", "here"],
        ),
    ]
    if tables:
        text += ["## The correction table of stepwise estimation", "", *describe_tables(tables)]
    if any(results.values()):
        text += ["", f"![win rates, segments, correction]({path.with_suffix('.png').name})", ""]
        plot(path.with_suffix(".png"), [line for line in lines if "win rate" in line], tables)
    path.write_text("\n".join(text), encoding="utf-8")


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
        {head[0]: f"{tenth * 10} to {tenth * 10 + 10} %"} | {name: values[tenth] for name, values in columns.items()}
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


def plot(path: Path, lines: list[dict[str, Any]], tables: dict[str, dict[str, np.ndarray]]) -> None:
    """Win rates beside faithfulness; win rate by timestep segment; C(t) as the run goes on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, segments, correction) = pyplot.subplots(
        1, 3, figsize=(17, 2 + 0.22 * len(lines)), layout="constrained"
    )
    _points(rates, [line["method"] for line in lines if line["method"] not in SEGMENTS][::-1], lines)
    obeyed = {line["method"]: line["captions obeyed after"] for line in lines if line["method"] not in SEGMENTS}
    rates.plot(list(obeyed.values()), list(obeyed), "x", color="grey", label="captions obeyed after")
    rates.axvline(0.5, color="grey", linewidth=1)
    rates.set_xlabel("win rate over the unchanged model, 95 % interval")
    rates.legend(loc="lower left", fontsize="small")
    _points(segments, [name for name in SEGMENTS if any(line["method"] == name for line in lines)][::-1], lines)
    segments.axvline(0.5, color="grey", linewidth=1)
    segments.set_xlabel("win rate of dpo on a tenth of the timesteps")
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


def _points(axes: Any, names: list[str], lines: list[dict[str, Any]]) -> None:
    by_name = {line["method"]: line for line in lines}
    shown = [by_name[name]["win rate"] for name in names]
    ends = np.array([[float(end) for end in by_name[name]["95 % interval"].split(" to ")] for name in names]).reshape(
        -1, 2
    )
    axes.errorbar(shown, names, xerr=np.abs(ends.T - np.array(shown)), fmt="o", capsize=3, label="win rate")

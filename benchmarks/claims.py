"""What the study's finished cells say: a line a row, what the papers claim and what holds, every method against dpo."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.study_rows import DETAIL, METHODS, SEGMENTS, Cell, Cells
from dpo.common.stats import Z95, share_interval

# Student's two-sided 95 % quantile of so many seeds: with five, two standard errors would call one in nine equals different.
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def t95(seeds: int) -> float:
    """T95 of any number of seeds from two on; beyond the table the expansion of Fisher and Cornish (1960), to 0.001 there."""
    z, f = Z95, seeds - 1
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return T95.get(seeds) or z + sum(term / f**power for power, term in enumerate(terms, start=1))


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
            error = t95(len(gaps)) * stdev(gaps) / len(gaps) ** 0.5
            line[name] += f" ± {error:.3f}"
            line[f"by {name}"] = (
                "undecided" if abs(mean(gaps)) <= error else "holds" if mean(gaps) > 0 else "does not hold"
            )
    return line


def against_dpo(results: Cells, taste: str) -> list[dict[str, Any]]:
    """Every method of the study against dpo, on one taste: taste is "" or DETAIL."""
    words = {"holds": "above", "does not hold": "below"}
    lines = []
    for row in METHODS:
        if row != "dpo":
            line = check(Claim(row, [row + taste], [f"dpo{taste}"]), results)
            lines.append(
                {"method": line.pop("claim")} | {name: words.get(value, value) for name, value in line.items()}
            )
    return lines

"""Is it better? What the figures of an evaluation say together, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.common.words import number_of
from dpo.pages.verdict import Verdict

Entry = Mapping[str, Any]  # of evaluation.json: the whole, or one of its results
WINS, TEST, APART = "the interval of the win rate", "the sign test", "the interval of the mean difference in score"
SURE = 0.05  # p below which a difference is called shown, where the interval of the win rate says so too


def standing(entry: Entry) -> str:
    """What one scorer says of a side: "better", "worse", "unsure" or "alike".

    Better or worse takes both the interval of the win rate, all on one side of one half, and the sign test's p after
    Holm's adjustment. Where one of them alone, or the interval of the difference, says so, it is unsure.
    """
    said = _signs(entry)
    if WINS in said and TEST in said:
        return "better" if entry["paired"]["win_interval"][0] > 0.5 else "worse"
    return "unsure" if said else "alike"


def _signs(entry: Entry) -> list[str]:
    """What says that the sides differ."""
    paired = entry["paired"]
    low, high = paired["win_interval"]
    apart = paired["difference_interval"]
    said = {
        WINS: low > 0.5 or high < 0.5,
        TEST: entry["p"] < SURE,
        APART: apart is not None and (apart[0] > 0 or apart[1] < 0),
    }
    return [sign for sign, holds in said.items() if holds]


def verdict(found: Entry, side: str) -> Verdict:
    """The judgement on one side: what all of its scorers say together."""
    entries = [entry for entry in found["results"] if entry["side"] == side]
    base = found["sides"][0]["name"]
    by = {
        kind: [entry["scorer"] for entry in entries if standing(entry) == kind]
        for kind in ("better", "worse", "unsure")
    }
    sentences = [_sentence(entry, base) for entry in entries]
    if not entries:
        return Verdict("early", f"{side} was not scored.", [])
    if by["better"] and by["worse"]:
        return Verdict("mixed", f"The scorers disagree on {side}.", sentences)
    for kind, level in (("better", "good"), ("worse", "poor")):
        if len(by[kind]) == len(entries):
            return Verdict(level, f"{side} is {kind} than {base}.", sentences)
        if by[kind]:
            text = f"{side} is {kind} than {base} by {', '.join(by[kind])}; the rest does not show it."
            return Verdict("mixed", text, sentences)
    shown = max(entry["paired"]["detectable"] or 1.0 for entry in entries)
    text = (
        f"So many prompts show a win rate of {shown:.0%} four times in five; a smaller gain needs more."
        if shown < 1
        else "So few prompts cannot show any: draw more."
    )
    if by["unsure"]:
        headline = f"{side} and {base} may differ by {', '.join(by['unsure'])}, but that is not shown."
        return Verdict("early", headline, [*sentences, *_unsure(entries), text])
    return Verdict("early", f"No difference between {side} and {base} can be shown.", [*sentences, text])


def _unsure(entries: list[Entry]) -> list[str]:
    """What alone says that a side differs, for each scorer of which that is true, and what is missing."""
    lines = [
        f"By {entry['scorer']} {' and '.join(_signs(entry))} alone {'say' if len(_signs(entry)) > 1 else 'says'} so."
        for entry in entries
        if standing(entry) == "unsure"
    ]
    return [*lines, f"Shown is what {WINS} and {TEST} both say."]


def _sentence(entry: Entry, base: str) -> str:
    paired = entry["paired"]
    low, high = paired["win_interval"]
    ties = f", {paired['ties']:.0%} of the pairs are ties" if paired["ties"] else ""
    return (
        f"By {entry['scorer']} its win rate over {base} is {paired['win_rate']:.0%} (95 % interval {low:.0%} to {high:.0%}) on "
        f"{number_of(paired['prompts'], 'prompts', ',')}{ties}; p {entry['p']:.2g}."
    )

"""The tables of votes.html and votes.md, as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WORDS = {"rule": "by the declared rule", "everyone": "with everybody"}
HOW = (
    "95 %. Win rates: bootstrap over prompts, with the raters' share of the error as a Student's t; Wilson's, with the "
    "effective number of prompts, where fewer than ten prompts are on one side. Counted shares: exact (Clopper and Pearson). "
    "p: two-sided sign test over prompts, Holm-adjusted over all comparisons"
)

Entry = Mapping[str, Any]


class Row(NamedTuple):
    """A line of the table of figures, as texts."""

    question: str
    model: str
    base: str
    counted: str
    majority: str
    votes: str
    ties: str
    cases: str
    p: str


HEAD = Row(
    "question",
    "model",
    "against",
    "raters",
    "majority's win rate",
    "votes' win rate",
    "ties of majorities; of votes",
    "majorities; votes",
    "p (Holm)",
)


def percent(interval: Sequence[float]) -> str:
    """An interval in percent, to a tenth where whole ones would hide on which side of one half it ends."""
    digits = 1 if any(end != 0.5 and f"{end:.0%}" == "50%" for end in interval) else 0
    return f"{interval[0]:.{digits}%} to {interval[1]:.{digits}%}"


def rows(found: Entry) -> list[Row]:
    """The table of figures: a line for each question and pair, by the rule, and with everybody where that is another."""
    return [
        Row(
            question["key"],
            pair["other"],
            pair["base"],
            WORDS[who],
            rate(pair[who]["majority"]),
            rate(pair[who]["votes"]),
            f"{pair[who]['majority']['ties']:.0%}; {pair[who]['votes']['ties']:.0%}",
            f"{pair[who]['majority']['cases']:,}; {pair[who]['votes']['cases']:,}",
            f"{pair['p']:.2g}" if who == "rule" else "",
        )
        for question in found["questions"]
        for pair in question["pairs"]
        for who in ("rule", "everyone")
        if pair[who] and (who == "rule" or found["left_out"])
    ]


def rate(one: Entry) -> str:
    return f"{one['win_rate']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"


def share(one: Entry) -> str:
    """A share with its interval and counts."""
    if not one["of"]:
        return "none"
    return f"{one['share']:.0%} ({percent(one['interval'])}; {one['hits']:,} of {one['of']:,})"


def _alpha(one: Entry) -> str:
    if one["alpha"] is None:
        return "cannot be measured"
    between = "" if one["interval"] is None else f" ({one['interval'][0]:.2f} to {one['interval'][1]:.2f})"
    return f"{one['alpha']:.2f}{between} on {one['items']:,} pairs of images with two votes or more"


def reviewers(found: Entry) -> list[tuple[str, str]]:
    """What reviewers of a study ask, and the answers."""
    study, everybody, same = found["study"], found["raters"], found["same"]
    spans = [pair["rule"] for question in found["questions"] for pair in question["pairs"] if pair["rule"]]
    counted = f"{min(one['fewest'] for one in spans)} to {max(one['most'] for one in spans)}" if spans else "none"
    rule = [f"{name}: below {share:.0%} right" for name, share in study["rule"].items() if share]
    right, broken = (sum(one["broken"][name] for one in everybody) for name in ("hits", "of"))
    agreement = [
        (
            f"agreement between raters, {one['key']}",
            f"Krippendorff's nominal alpha {_alpha(one['alpha']['rule'])}",
        )
        for one in found["questions"]
    ]
    every = [
        (
            "raters",
            f"{len(everybody)}, of whom the rule leaves out {len(found['left_out'])}; who they are and what they were paid is "
            "not known here",
        ),
        ("questions", "\n".join(f"{one['key']}: {one['text']}" for one in study["questions"])),
        ("prompts", study["note"] or f"{study['prompts']:,} prompts, {study['items']:,} pairs of images"),
        (
            "votes",
            f"{sum(one['votes'] for one in everybody):,}; wanted for each pair of images and question {study['votes']}, "
            f"of the raters that the rule leaves {counted}",
        ),
        ("answers that may be given", "one of two images" + (', or "can\'t tell"' if study["tie"] else "; no tie")),
        ("instructions", study["instructions"]),
        ("notice", study["notice"]),
        (
            "blinding",
            "images were served without names, addresses or metadata that tell the model; sides keyed, and balanced over "
            "the raters of a question",
        ),
        ("left-hand image chosen", share(found["sides"])),
        ("exclusion, declared before the first vote", "; ".join(rule) or "nobody is left out"),
        ("checks with a broken image", f"{study['checks']['broken']} in the study; {right} of {broken} answers right"),
        (
            "one image shown twice",
            f"{study['checks']['same']} in the study; {same['of']} answers, of these {same['ties']} ties and {same['left']} for "
            "the left-hand side",
        ),
        *agreement,
        (
            "agreement with oneself",
            f"{share(found['alike'])}; {study['repeats']:.0%} of the votes are asked again with sides swapped, and do not "
            "count as votes",
        ),
        ("a vote is that of the others' majority", share(found["majority"])),
        ("median time of an answer", "not known" if found["seconds"] is None else f"{found['seconds']:.1f} s"),
        ("intervals", HOW),
    ]
    return [(name, text) for name, text in every if text]


def strengths(found: Entry) -> list[tuple[str, str, str, str]]:
    """(question, model, log strength with interval, share against the base) of studies of more than two models."""
    return [
        (
            question["key"],
            one["side"],
            "0, by definition"
            if one["interval"] is None
            else f"{one['strength']:+.2f} ({one['interval'][0]:+.2f} to {one['interval'][1]:+.2f})",
            f"{one['over_base']:.0%}",
        )
        for question in found["questions"]
        for one in question["strengths"] or []
    ]


def trust(found: Entry) -> list[tuple[str, str, str, str, str, str]]:
    """The scorers beside the people, best first by question, as texts."""
    return [
        (
            question,
            one["scorer"],
            rate({"win_rate": one["majority"], "interval": one["interval"]}),
            f"{one['votes']:.3f}",
            _behind(one, first=one is entries[0]),
            f"{one['items']:,}; {one['left_out']:,} without a preference left out",
        )
        for question, entries in found["scorers"].items()
        for one in entries
    ]


def _behind(one: Entry, first: bool) -> str:
    if first:
        return "the first"
    if one["behind"] is None:
        return "too few prompts to tell"
    low, high = one["behind"]
    return f"{low:.3f} to {high:.3f}" + (": not enough to tell" if one["level"] else "")


def raters(found: Entry) -> list[tuple[str, ...]]:
    """A line for each rater, as texts."""
    return [
        (
            one["rater"],
            f"{one['votes']:,}",
            f"{one['ties']:,}",
            "" if one["seconds"] is None else f"{one['seconds']:.1f} s",
            share(one["left"]) + (": a habit" if one["rater"] in found["biased"] else ""),
            share(one["majority"]),
            share(one["alike"]),
            f"{one['broken']['hits']} of {one['broken']['of']}",
            "; ".join(one["reasons"]),
        )
        for one in found["raters"]
    ]

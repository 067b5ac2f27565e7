"""votes.html and votes.md: which model people prefer and how surely, from votes.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from dpo.common.errors import UserError, reading
from dpo.common.files import AGAIN, write_text
from dpo.common.words import first_line, printable, well_formed
from dpo.pages.charts import LIGHT
from dpo.pages.evaluation import LABEL, OF_CONTENT
from dpo.pages.markdown import cell, table
from dpo.pages.plots import SIZE, svg
from dpo.pages.report import Tile, template
from dpo.pages.verdict import Verdict
from dpo.pages.vote_tables import HEAD, Entry, percent, rate, raters, reviewers, rows, share, strengths, trust

FILE, PAGE, TABLE = "votes.json", "votes.html", "votes.md"
REMEDY = "run python -m dpo.vote with --report again"


def write_pages(path: Path) -> list[Path]:
    """Writes page and table beside a votes.json; their paths. Raises UserError where that is none."""
    with reading(str(path), REMEDY):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("questions"), list):
        raise UserError(f"{path} holds no votes that were counted: {REMEDY}")
    try:
        texts = {path.with_name(PAGE): render(found), path.with_name(TABLE): markdown(found)}
    except OF_CONTENT as error:
        raise UserError(
            f"{path} is none of this version ({type(error).__name__}: {first_line(error)}): {REMEDY}"
        ) from error
    for place, text in texts.items():
        write_text(place, well_formed(text), AGAIN)
    return list(texts)


# --- in words ----------------------------------------------------------------------------------------------------------


def pairs(found: Entry) -> list[tuple[str, str]]:
    """(base, other) of the pairs of models that have votes, in order."""
    every = [
        (pair["base"], pair["other"]) for question in found["questions"] for pair in question["pairs"] if pair["rule"]
    ]
    return list(dict.fromkeys(every))


def verdict(found: Entry, base: str, other: str) -> Verdict:
    """The judgement on two models: what the majority of raters says to all questions together."""
    entries = _entries(found, base, other)
    told = [(text, pair["rule"]["majority"]["win_rate"]) for text, pair in entries if pair["enough"]]
    better = [text for text, rate in told if rate > 0.5]
    worse = [text for text, rate in told if rate < 0.5]
    sentences = [_sentence(question, pair) for question, pair in entries]
    if better and worse:
        return Verdict("mixed", f"It depends on what is asked whether {other} is preferred to {base}.", sentences)
    if worse:
        part = "" if len(worse) == len(entries) else f" by {', '.join(worse)}; not enough to tell by the rest"
        return Verdict("poor", f"People prefer {base} to {other}{part}.", sentences)
    if better:
        part = "" if len(better) == len(entries) else f" by {', '.join(better)}; not enough to tell by the rest"
        return Verdict("mixed" if part else "good", f"People prefer {other} to {base}{part}.", sentences)
    least = max((pair["rule"]["detectable"] or 1.0 for _, pair in entries), default=1.0)
    text = (
        f"So many prompts show a win rate of {least:.0%} four times in five; a smaller one needs more prompts."
        if least < 1
        else "So few prompts cannot show anything: ask about more."
    )
    return Verdict("early", f"Not enough to tell whether people prefer {other} or {base}.", [*sentences, text])


def _entries(found: Entry, base: str, other: str) -> list[tuple[str, Entry]]:
    """(question's key, pair) of two models, where there are votes."""
    return [
        (question["key"], pair)
        for question in found["questions"]
        for pair in question["pairs"]
        if (pair["base"], pair["other"]) == (base, other) and pair["rule"]
    ]


def _sentence(question: str, pair: Entry) -> str:
    majority, votes = pair["rule"]["majority"], pair["rule"]["votes"]
    end = "" if pair["enough"] else ": not enough to tell"
    return (
        f"{question}: the majority of raters prefers {pair['other']} for {majority['win_rate']:.0%} of {majority['prompts']:,} "
        f"prompts (95 % interval {percent(majority['interval'])}){end}; it gets {votes['win_rate']:.0%} of the votes "
        f"({percent(votes['interval'])})."
    )


def headline(found: Entry) -> list[str]:
    """The verdicts, a line each, and what should make one wary, for the console."""
    judged = [verdict(found, *pair) for pair in pairs(found)]
    said = [" ".join([one.headline, *one.sentences]) for one in judged]
    return [printable(line) for line in [*said, *(f"Be wary: {line}" for line in found["warnings"])]]


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(found: Entry) -> str:
    """The figures as Markdown, with what reviewers ask."""
    said = " ".join(verdict(found, *pair).headline for pair in pairs(found))
    tables = [table(HEAD, rows(found)), _ranked(found), _trusted(found), table(("reviewers ask", ""), reviewers(found))]
    return "\n\n".join(filter(None, [cell(said), *tables, *map(cell, found["warnings"])])) + "\n"


def _ranked(found: Entry) -> str:
    return table(
        ("question", "model", "strength (Bradley-Terry, votes)", "votes it would get against the first"),
        strengths(found),
    )


def _trusted(found: Entry) -> str:
    return table(
        ("question", "scorer", "agrees with the majority", "with votes", "behind the first", "pairs of images"),
        trust(found),
    )


# --- the page ----------------------------------------------------------------------------------------------------------


def render(found: Entry) -> str:
    """The page, as HTML without script or network."""
    sides = [
        {
            "name": f"{other} against {base}",
            "verdict": verdict(found, base, other),
            "tiles": _tiles(found, base, other),
            "title": f"How often {other} is preferred to {base}",
            "chart": Markup(
                svg(
                    f"votes{number}",
                    f"Win rates of {other} against {base}",
                    _wins(_entries(found, base, other)),
                    (SIZE[0], 1.4 + 0.62 * len(_entries(found, base, other))),
                    left=0.3,
                )
            ),
            "categories": _categories(found, base, other),
        }
        for number, (base, other) in enumerate(pairs(found))
    ]
    return template("votes.html").render(
        title=found["study"]["title"],
        study=found["study"],
        sides=sides,
        warnings=found["warnings"],
        head=HEAD,
        rows=rows(found),
        raters=raters(found),
        strengths=strengths(found),
        several=len(found["study"]["sides"]) > 2,
        trust=trust(found),
        ceiling=share(found["majority"]),
        reviewers=reviewers(found),
        made=list((found.get("made") or {}).items()),
    )


def _tiles(found: Entry, base: str, other: str) -> list[Tile]:
    return [
        Tile(
            f"Majority, {question}",
            f"{pair['rule']['majority']['win_rate']:.0%}",
            f"{percent(pair['rule']['majority']['interval'])}; no preference: 50%"
            + ("" if pair["enough"] else "; not enough to tell"),
        )
        for question, pair in _entries(found, base, other)
    ] + [
        Tile(
            f"Votes, {question}",
            f"{pair['rule']['votes']['win_rate']:.0%}",
            f"{percent(pair['rule']['votes']['interval'])} of {pair['rule']['votes']['cases']:,} votes",
        )
        for question, pair in _entries(found, base, other)
    ]


def _wins(entries: Sequence[tuple[str, Entry]]) -> Callable[[Axes], None]:
    """Draws both win rates with their intervals, two lines a question; a dashed line marks one half."""

    def draw(axes: Axes) -> None:
        for place, (_, pair) in enumerate(entries[::-1]):
            for kind, colour, above in (("majority", "policy", 0.16), ("votes", "other", -0.16)):
                one = pair["rule"][kind]
                label = {"majority": "majorities", "votes": "votes"}[kind] if not place else None
                axes.plot(one["interval"], [place + above] * 2, color=LIGHT[colour], linewidth=2.5, label=label)
                axes.plot([one["win_rate"]], [place + above], "o", color=LIGHT[colour], markersize=7)
        axes.axvline(0.5, color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(entries) - 0.4)
        names = [printable(question)[:LABEL] for question, _ in entries[::-1]]
        axes.set_yticks(range(len(entries)), names, parse_math=False)
        axes.set_xlabel("share of prompts, or of votes, won")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)

    return draw


def _categories(found: Entry, base: str, other: str) -> dict[str, Any]:
    """The majority's win rates by category and question, as texts; empty without categories."""
    entries = _entries(found, base, other)
    kinds = sorted({kind for _, pair in entries for kind in pair["categories"]})
    lines = [
        (kind, [rate(one["majority"]) if one else "" for one in (pair["categories"].get(kind) for _, pair in entries)])
        for kind in kinds
    ]
    return {"questions": [question for question, _ in entries], "rows": lines}

"""Everything that the report of a study says, as one JSON object (votes.json), which page and table are made from.

format      1
study       {name, title, instructions, notice, questions: [{key, text}], tie, votes, sides, prompts, items, checks, repeats,
             rule, note, seed}: as it was declared
questions   [{key, text, pairs: [pair], alpha: {rule, everyone}, strengths}]
  pair      {base, other, rule, everyone: compared or None, p: Holm-adjusted, enough, categories: {name: compared}}
  compared  {majority, votes: {win_rate, interval, ties, prompts, cases}, raters, fewest, most, p_sign, detectable}
raters      [{rater, votes, ties, seconds, left, alike, majority, broken, reasons}]; numbers stand for the names
left_out    [{rater, reasons}]
sides, alike, majority    shares {share, hits, of, interval} of all raters: left-hand images chosen, repeats answered alike,
             votes that are those of the others' majority; biased: {rater: p}
same        {of, ties, left}: answers on one image shown twice
seconds     median time of an answer
scorers     {question: [{scorer, ...}]} as dpo/voting/trust.py has them
warnings    [lines]
made        {answers, study: SHA-256 of the files, version}

"rule" is without the raters that the study's rule leaves out, "everyone" with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from dpo.common.words import digest, listed
from dpo.pages.better import SURE
from dpo.scorers.compare import detectable, holm
from dpo.voting import agreement, tally
from dpo.voting.agreement import Share
from dpo.voting.answers import Answer
from dpo.voting.rates import compared
from dpo.voting.study import Item, Question, Study

FORMAT = 1
SEED = 0  # of the bootstrap
RESAMPLES, OF_CATEGORY = 4000, 1000
OPEN = "it is not enough to tell"
HURRIED = 1.0  # seconds: a median below it means that nobody looked at two images


def figures(study: Study, answers: Sequence[Answer]) -> dict[str, Any]:
    """The object above, without `scorers` and `made`. The order of the answers does not matter."""
    names = numbered(study, answers)
    out = tally.left_out(study, answers)
    questions = [_question(study, answers, question, out) for question in study.questions]
    pairs = [pair for question in questions for pair in question["pairs"] if pair["rule"] is not None]
    for pair, p in zip(pairs, holm([pair["rule"]["p_sign"] for pair in pairs]), strict=True):
        pair["p"] = p
        pair["enough"] = pair["enough"] and p < SURE  # both say so, as dpo.evaluate has it
    every = [tally.votes(study, answers, question.key) for question in study.questions]
    together = _together(every)
    raw = tally.raters(answers)
    sides = agreement.sides(together, raw)
    majority, majority_by = agreement.with_majority(together, raw)
    alike, alike_by = agreement.with_itself(tally.repeated(list(tally.answered(study, answers))))
    by_rater = _raters(tally.of_raters(study, answers), names, out, (sides.by_rater, alike_by, majority_by))
    content = {
        "format": FORMAT,
        "study": _declared(study),
        "questions": questions,
        "raters": by_rater,
        "left_out": [{"rater": names[rater], "reasons": out[rater]} for rater in names if rater in out],
        "sides": shown(sides.all),
        "biased": {names[rater]: p for rater, p in sides.biased.items()},
        "alike": shown(alike),
        "majority": shown(majority),
        "same": _same(study, answers),
        "seconds": median(answer.seconds for answer in answers) if answers else None,
        "scorers": {},
    }
    return {**content, "warnings": cautions(content)}


def numbered(study: Study, answers: Sequence[Answer]) -> dict[str, str]:
    """What a page calls each rater: numbers that say nothing of the name."""
    ranked = sorted(tally.raters(answers), key=lambda name: digest(str(study.seed), study.name, name))
    return {name: f"rater {number}" for number, name in enumerate(ranked, 1)}


def shown(one: Share) -> dict[str, Any]:
    """A share as it stands in the object."""
    return {"share": one.share, **asdict(one)}


def _declared(study: Study) -> dict[str, Any]:
    kinds = Counter(item.kind for item in study.items)
    return {
        "name": study.name,
        "title": study.title,
        "instructions": study.instructions,
        "notice": study.notice,
        "questions": [asdict(question) for question in study.questions],
        "tie": study.tie,
        "votes": study.votes,
        "sides": list(study.sides),
        "prompts": len({item.prompt for item in study.items if item.kind == "vote"}),
        "items": kinds["vote"],
        "checks": {"broken": kinds["broken"], "same": kinds["same"]},
        "repeats": study.repeats,
        "rule": asdict(study.rule),
        "note": study.note,
        "seed": study.seed,
    }


def _question(
    study: Study, answers: Sequence[Answer], question: Question, out: Mapping[str, list[str]]
) -> dict[str, Any]:
    ruled = tally.votes(study, answers, question.key, without=out)
    alpha = asdict(agreement.alpha(ruled, seed=SEED))
    everyone = alpha if not out else asdict(agreement.alpha(tally.votes(study, answers, question.key), seed=SEED))
    return {
        "key": question.key,
        "text": question.text,
        "pairs": [_pair(study, answers, question.key, pair, out) for pair in tally.pairs(study)],
        "alpha": {"rule": alpha, "everyone": everyone},
        "strengths": _strengths(study, ruled),
    }


def _strengths(study: Study, votes: tally.Votes) -> list[dict[str, Any]] | None:
    """Strengths by votes; None for two models, and where votes give some none."""
    if len(study.sides) < 3 or not len(votes.value):
        return None
    models = np.array([tally.pair_of(study.items[item]) for item in votes.item])
    found = agreement.strengths(models[:, 0], models[:, 1], votes, study.sides, seed=SEED)
    return None if found is None else [asdict(one) for one in found]


def _pair(
    study: Study, answers: Sequence[Answer], question: str, pair: tally.Pair, out: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Two models by one question."""
    ruled = tally.votes(study, answers, question, pair, out)
    main = _compared(ruled, RESAMPLES)
    every = main if not out else _compared(tally.votes(study, answers, question, pair), RESAMPLES)
    kinds = np.array([study.items[item].category for item in ruled.item], dtype=object)
    interval = main["majority"]["interval"] if main else (0.0, 1.0)
    return {
        "base": study.sides[pair[0]],
        "other": study.sides[pair[1]],
        "rule": main,
        "everyone": every,
        "p": None,
        "enough": not interval[0] <= 0.5 <= interval[1],
        "categories": {
            str(kind): _compared(ruled.where(kinds == kind), OF_CATEGORY) for kind in sorted(set(kinds.tolist()) - {""})
        },
    }


def _compared(votes: tally.Votes, resamples: int) -> dict[str, Any] | None:
    if not len(votes.value):
        return None
    found = compared(votes, seed=SEED, resamples=resamples)
    return {**asdict(found), "detectable": detectable(found.majority.prompts)}


def _together(parts: Sequence[tally.Votes]) -> tally.Votes:
    """The votes of all questions; an item of another question is another item."""
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("prompt", "rater", "value", "left"))
    prompt, rater, value, left = columns
    span = 1 + max((int(part.item.max()) for part in parts if len(part.item)), default=0)
    item = np.concatenate([part.item + number * span for number, part in enumerate(parts)])
    return tally.Votes(prompt, item, rater, value, left)


def _raters(
    given: Mapping[str, list[tuple[Answer, Item]]],
    names: Mapping[str, str],
    out: Mapping[str, list[str]],
    shares: tuple[Mapping[str, Share], ...],
) -> list[dict[str, Any]]:
    """A line for each rater, in the order of their numbers."""
    lines = []
    for rater, number in names.items():
        mine = given[rater]
        cast = [answer for answer, item in mine if item.kind == "vote" and not answer.repeat]
        broken = tally.broken(mine)
        left, alike, majority = (shown(found.get(rater, agreement.counted(0, 0))) for found in shares)
        lines.append(
            {
                "rater": number,
                "votes": len(cast),
                "ties": sum(answer.choice == "tie" for answer in cast),
                "seconds": median(answer.seconds for answer, _ in mine) if mine else None,
                "left": left,
                "alike": alike,
                "majority": majority,
                "broken": {"hits": sum(broken), "of": len(broken)},
                "reasons": out.get(rater, []),
            }
        )
    return lines


def _same(study: Study, answers: Sequence[Answer]) -> dict[str, int]:
    found = [answer for answer, item in tally.answered(study, answers) if item.kind == "same"]
    decided = [answer for answer in found if answer.choice != "tie"]
    return {"of": len(found), "ties": len(found) - len(decided), "left": sum(map(tally.on_left, decided))}


def cautions(content: Mapping[str, Any]) -> list[str]:
    """Lines on what should make one wary of the figures."""
    declared, lines = content["study"], []
    wanted = declared["items"] * len(declared["questions"]) * declared["votes"]
    cast = sum(one["votes"] for one in content["raters"])
    if cast < wanted:
        lines.append(
            f"{cast:,} of {wanted:,} votes that the study wants were cast: ask on, or call it what it is, a part"
        )
    if len(content["raters"]) == 1:
        lines.append(
            "one rater: the figures hold for this person alone, and no agreement between raters can be measured"
        )
    for question in content["questions"]:
        for pair in question["pairs"]:
            lines += _of_pair(question["key"], pair)
    if content["biased"]:
        lines.append(
            f"{listed(content['biased'])} chose one side of the screen, whatever stood there, more often than chance explains"
        )
    elif content["sides"]["of"] and not _holds(content["sides"]["interval"], 0.5):
        lines.append(
            f"the left-hand image was chosen in {content['sides']['share']:.0%} of the votes; sides are balanced, so this blurs all win rates"
        )
    if content["seconds"] is not None and content["seconds"] < HURRIED:
        lines.append(f"half of the answers took less than {content['seconds']:.1f} s: too short to look at two images")
    for question in content["questions"]:
        found = question["alpha"]["rule"]
        if found["interval"] is not None and found["interval"][0] <= 0:
            lines.append(
                f"{question['key']}: raters agree no more than by chance as far as can be told (alpha {found['alpha']:.2f})"
            )
    return lines


def _of_pair(key: str, pair: Mapping[str, Any]) -> list[str]:
    """What is to be said of one pair by one question."""
    ruled, every, lines = pair["rule"], pair["everyone"], []
    name = f"{key}: {pair['other']} against {pair['base']}"
    if ruled is None:
        return [f"{name}: no vote" + (" but of raters whom the rule leaves out" if every else "")]
    said = {who: _said(pair, one["majority"]["interval"]) for who, one in (("rule", ruled), ("everyone", every))}
    if said["rule"] != said["everyone"]:
        lines.append(
            f"{name}: without the raters whom the rule leaves out {said['rule']}, with them {said['everyone']}"
        )
    by_vote = _said(pair, ruled["votes"]["interval"])
    if by_vote != said["rule"] and OPEN not in (by_vote, said["rule"]):
        lines.append(f"{name}: by majority {said['rule']}, by votes {by_vote}")
    if ruled["most"] == 1:
        lines.append(f"{name}: one vote an item is no majority; the two win rates are one figure")
    return lines


def _said(pair: Mapping[str, Any], interval: Sequence[float]) -> str:
    """What an interval of a win rate says of a pair, in words."""
    return OPEN if _holds(interval, 0.5) else f"{pair['other' if interval[0] > 0.5 else 'base']} is preferred"


def _holds(interval: Sequence[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]

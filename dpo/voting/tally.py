"""Answers as arrays: the votes of one question on one pair of models, and what is no vote apart."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo.voting.answers import Answer
from dpo.voting.study import BROKEN, Item, Study

Pair = tuple[int, int]  # two models as indices into Study.sides, the smaller first


@dataclass(frozen=True)
class Votes:
    """N votes, a row each. A vote is an answer on an item of kind "vote" that is no repeat."""

    prompt: np.ndarray  # [N] int64: number of the prompt, which several items may share
    item: np.ndarray  # [N] int64: number of the item
    rater: np.ndarray  # [N] int64: number of the rater
    value: np.ndarray  # [N] float64: +1 for the later model of the pair, -1 for the earlier, 0 for a tie
    left: np.ndarray  # [N] bool: the chosen image stood on the left; of no meaning for a tie

    def where(self, rows: np.ndarray) -> Votes:
        """The votes of these rows (indices or a mask)."""
        return Votes(self.prompt[rows], self.item[rows], self.rater[rows], self.value[rows], self.left[rows])


def pair_of(item: Item) -> Pair:
    """The two models of an item of kind "vote"."""
    first, second = sorted(item.sides)
    return first, second


def pairs(study: Study) -> list[Pair]:
    """The pairs of models that are compared, in order."""
    return sorted({pair_of(item) for item in study.items if item.kind == "vote"})


def raters(answers: Sequence[Answer]) -> list[str]:
    """Everybody who answered, in order of the name: no result depends on who came first."""
    return sorted({answer.rater for answer in answers})


def votes(
    study: Study, answers: Sequence[Answer], question: str, pair: Pair | None = None, without: Container[str] = ()
) -> Votes:
    """The votes on a question; on one pair of models, or on all. without: raters who are left out."""
    number = {item.id: place for place, item in enumerate(study.items)}
    prompts = {text: place for place, text in enumerate(dict.fromkeys(item.prompt for item in study.items))}
    names = {name: place for place, name in enumerate(raters(answers))}
    rows: list[tuple[int, int, int, float, bool]] = []
    for answer, item in answered(study, answers):
        if answer.question != question or answer.repeat or item.kind != "vote" or answer.rater in without:
            continue
        if pair is None or pair_of(item) == pair:
            place = number[item.id], names[answer.rater]
            rows.append((prompts[item.prompt], *place, value(answer, item), on_left(answer)))
    rows.sort()
    return Votes(
        prompt=np.array([row[0] for row in rows], np.int64),
        item=np.array([row[1] for row in rows], np.int64),
        rater=np.array([row[2] for row in rows], np.int64),
        value=np.array([row[3] for row in rows], np.float64),
        left=np.array([row[4] for row in rows], bool),
    )


def answered(study: Study, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Item]]:
    """Each answer with its item. An item that the study has not is passed over: the server takes no such answer."""
    known = {item.id: item for item in study.items}
    return ((answer, known[answer.item]) for answer in answers if answer.item in known)


def value(answer: Answer, item: Item) -> float:
    """+1 where the image of the later model was preferred, -1 for the earlier, 0 for a tie."""
    if answer.choice == "tie":
        return 0.0
    chosen, other = item.sides if answer.choice == "first" else item.sides[::-1]
    return 1.0 if chosen > other else -1.0


def on_left(answer: Answer) -> bool:
    """Whether the chosen image stood on the left."""
    return answer.choice == ("first", "second")[answer.left]


def left_out(study: Study, answers: Sequence[Answer]) -> dict[str, list[str]]:
    """The raters that the study's rule leaves out, each with its reasons in words."""
    found: dict[str, list[str]] = {}
    for rater, mine in of_raters(study, answers).items():
        right, alike = broken(mine), [same for _, same in repeated(mine)]
        reasons = [
            f"{sum(hits)} of {len(hits)} {what}, the rule asks for {least:.0%}"
            for hits, least, what in (
                (right, study.rule.broken, "checks with a broken image right"),
                (alike, study.rule.repeats, "repeated questions answered alike"),
            )
            if hits and sum(hits) < least * len(hits)
        ]
        if reasons:
            found[rater] = reasons
    return found


def broken(answered: Sequence[tuple[Answer, Item]]) -> list[bool]:
    """Whether the sound image was chosen, of each answer to a check with a broken one; a tie is not right."""
    return [
        answer.choice != "tie" and item.sides[answer.choice == "second"] != BROKEN
        for answer, item in answered
        if item.kind == "broken"
    ]


def repeated(answered: Sequence[tuple[Answer, Item]]) -> list[tuple[str, bool]]:
    """(rater, whether it was the same) of each answer to a question asked again with sides swapped."""
    first = {(a.rater, a.item, a.question): a.choice for a, _ in answered if not a.repeat}
    return [
        (answer.rater, answer.choice == first[key])
        for answer, _ in answered
        for key in [(answer.rater, answer.item, answer.question)]
        if answer.repeat and key in first
    ]


def of_raters(study: Study, answers: Sequence[Answer]) -> dict[str, list[tuple[Answer, Item]]]:
    """Each rater's answers with their items, in order of the name."""
    found: dict[str, list[tuple[Answer, Item]]] = {rater: [] for rater in raters(answers)}
    for answer, item in answered(study, answers):
        found[answer.rater].append((answer, item))
    return found

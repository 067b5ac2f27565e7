"""Which question a rater gets next: a function of the study, the answers so far, the rater and what others hold.

Questions with the fewest votes come first, so that a study that ends early has the same number of votes everywhere. Each
(item, question) comes once a rater. Of its raters half see the first image on the left, or half but one. A share of a
rater's own votes comes again with sides swapped, and checks come early and then through the whole run.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from dpo.common.words import digest
from dpo.voting.answers import Answer
from dpo.voting.study import Study

BLOCK = 10  # votes of a rater before the next kind of question is preferred: reading another one each time tires
FIRST_CHECK = (2, 4)  # votes before a rater's first check: at least, at most
EVERY = 20  # votes from check to check, on average, at most: few raters go through a long study
GAP = 5  # answers between a question and its repeat, at least, while there is anything else to ask


class Asked(NamedTuple):
    """A question as a rater gets it."""

    item: str
    question: str  # its key
    left: Literal[0, 1]  # which of the item's images stands on the left
    repeat: bool = False


class Progress(NamedTuple):
    """How far a rater is, in answers."""

    done: int
    left: int  # the most that are still to come


class Tally:
    """The answers that stand, counted for what is asked next; the same whichever way it came about."""

    def __init__(self, study: Study, answers: Iterable[Answer] = ()) -> None:
        self.study = study
        self.kinds = {item.id: item.kind for item in study.items}
        self.votes: Counter[tuple[str, str]] = Counter()  # of (item, question), by all raters
        self.lefts: Counter[tuple[str, str]] = Counter()  # of those, with the first image on the left
        self.given: dict[str, list[Answer]] = defaultdict(list)  # by rater, in their order
        self.asked: dict[str, set[tuple[str, str]]] = defaultdict(set)  # by rater
        self.repeated: dict[str, set[tuple[str, str]]] = defaultdict(set)  # by rater
        self.cast: Counter[str] = Counter()  # votes by rater
        self.checks: Counter[str] = Counter()  # answered checks by rater
        self._plans: dict[str, _Plan] = {}
        for answer in answers:
            self.add(answer)

    def add(self, answer: Answer) -> None:
        """Counts an answer."""
        self.given[answer.rater].append(answer)
        self._count(answer, 1)

    def take_back(self, answer: Answer) -> None:
        """Counts an answer no more."""
        self.given[answer.rater].remove(answer)
        self._count(answer, -1)

    def plan(self, rater: str) -> _Plan:
        """What is keyed by study and rater alone."""
        if rater not in self._plans:
            self._plans[rater] = _planned(self.study, rater)
        return self._plans[rater]

    def _count(self, answer: Answer, by: int) -> None:
        rater, key = answer.rater, (answer.item, answer.question)
        marked = self.repeated if answer.repeat else self.asked
        (marked[rater].add if by > 0 else marked[rater].discard)(key)
        if answer.repeat:
            return
        if self.kinds.get(answer.item) == "vote":
            self.cast[rater] += by
            self.votes[key] += by
            self.lefts[key] += by * (answer.left == 0)
        else:
            self.checks[rater] += by


def following(tally: Tally, rater: str, held: Collection[tuple[str, Asked]] = ()) -> Asked | None:
    """What `rater` is asked next; None when there is nothing, or others hold all that is left.

    held: (rater, question) that were handed out and not answered yet, this rater's own too: those count as votes that
    will come, and this rater's own are not asked twice.
    """
    study, plan = tally.study, tally.plan(rater)
    own = [asked for name, asked in held if name == rater]
    votes = [asked for asked in own if tally.kinds[asked.item] == "vote" and not asked.repeat]
    cast = tally.cast[rater] + len(votes)
    seen = {(asked.item, asked.question) for asked in own if not asked.repeat} | tally.asked[rater]
    prefer = plan.questions[cast // BLOCK % len(plan.questions)]
    if (check := _check(study, plan, rater, cast, seen, prefer)) is not None:
        return check
    repeat, between = _repeat(tally, rater, cast, own, prefer)
    if repeat is not None and between >= GAP:
        return repeat
    return _vote(tally, plan, seen, prefer, held) or repeat


def progress(tally: Tally, rater: str) -> Progress:
    """How far `rater` is, were nobody else to answer."""
    plan, open_votes = tally.plan(rater), len(wanted(tally, rater))
    votes = tally.cast[rater] + open_votes
    checks = sum(due <= votes for due in plan.due) - tally.checks[rater]
    repeats = _wanted_repeats(tally.study, votes) - len(tally.repeated[rater])
    return Progress(len(tally.given[rater]), open_votes + max(0, checks) + max(0, repeats))


def wanted(tally: Tally, rater: str) -> list[tuple[str, str]]:
    """The (item, question) that want votes which this rater could give, though others may hold them just now."""
    asked, votes = tally.asked[rater], tally.study.votes
    return [key for key in tally.plan(rater).order if key not in asked and tally.votes.get(key, 0) < votes]


class _Plan(NamedTuple):
    """What is keyed by study and rater alone."""

    order: dict[tuple[str, str], int]  # (item, question) of votes -> place
    questions: tuple[str, ...]
    checks: tuple[str, ...]  # items
    due: tuple[int, ...]  # after so many votes each


def _planned(study: Study, rater: str) -> _Plan:
    seed, keys = str(study.seed), [question.key for question in study.questions]

    def shuffled(what: str, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: digest(seed, rater, what, name))

    votes = [(item.id, key) for item in study.items if item.kind == "vote" for key in keys]
    order = sorted(votes, key=lambda key: digest(seed, rater, "order", *key))
    broken, same = (
        shuffled("check", (item.id for item in study.items if item.kind == kind)) for kind in ("broken", "same")
    )
    checks = [name for pair in itertools.zip_longest(broken, same) for name in pair if name is not None]
    first = FIRST_CHECK[0] + _keyed(FIRST_CHECK[1] - FIRST_CHECK[0] + 1, seed, rater, "first check")
    first = min(first, len(votes))
    apart = min(EVERY, (len(votes) - first) / max(1, len(checks)))
    later = [
        first + int((number + _keyed(100, seed, rater, "check", number) / 200) * apart)
        for number in range(1, len(checks))
    ]
    return _Plan(
        order={key: place for place, key in enumerate(order)},
        questions=tuple(shuffled("question", keys)),
        checks=tuple(checks),
        due=(first, *later)[: len(checks)],
    )


def _keyed(below: int, *parts: object) -> int:
    """A whole number from 0 to `below` - 1, the same for the same parts."""
    return int(digest(*map(str, parts)), 16) % below


def _check(
    study: Study, plan: _Plan, rater: str, cast: int, seen: Collection[tuple[str, str]], prefer: str
) -> Asked | None:
    """The check that is due after so many votes; None where none is."""
    met = {item for item, _ in seen}
    for item, due in zip(plan.checks, plan.due, strict=True):
        if due > cast:
            return None
        if item not in met:
            return Asked(item, prefer, _side(study, rater, item))
    return None


def _side(study: Study, *parts: str) -> Literal[0, 1]:
    return 1 if _keyed(2, study.seed, "left", *parts) else 0


def _wanted_repeats(study: Study, votes: int) -> int:
    return int(votes * study.repeats + 0.5)


def _repeat(tally: Tally, rater: str, cast: int, own: Collection[Asked], prefer: str) -> tuple[Asked | None, int]:
    """An earlier vote of this rater with sides swapped, None where none is due, and how many answers lie between.

    own: what the rater holds.
    """
    done = tally.repeated[rater].union((asked.item, asked.question) for asked in own if asked.repeat)
    given = tally.given[rater]
    found = [
        (len(given) + len(own) - 1 - place, answer)
        for place, answer in enumerate(given)
        if not answer.repeat and tally.kinds.get(answer.item) == "vote" and (answer.item, answer.question) not in done
    ]
    if not found or _wanted_repeats(tally.study, cast) <= len(done):
        return None, 0
    old = [entry for entry in found if entry[0] >= GAP] or found[:1]

    def rank(entry: tuple[int, Answer]) -> tuple[bool, str]:
        item, question = entry[1].item, entry[1].question
        return question != prefer, digest(str(tally.study.seed), rater, "again", item, question)

    between, answer = min(old, key=rank)
    return Asked(answer.item, answer.question, 1 if answer.left == 0 else 0, repeat=True), between


def _vote(
    tally: Tally,
    plan: _Plan,
    seen: Collection[tuple[str, str]],
    prefer: str,
    held: Collection[tuple[str, Asked]],
) -> Asked | None:
    """The question with the fewest votes, given or to come, of those that are still wanted."""
    coming: Counter[tuple[str, str]] = Counter()
    lefts: Counter[tuple[str, str]] = Counter()
    for _, asked in held:
        if not asked.repeat:
            coming[asked.item, asked.question] += 1
            lefts[asked.item, asked.question] += asked.left == 0
    best: tuple[int, bool, int] | None = None
    chosen: tuple[str, str] | None = None
    for key, place in plan.order.items():
        count = tally.votes.get(key, 0) + coming.get(key, 0)  # a Counter's own way takes five times as long
        if count < tally.study.votes and key not in seen:
            rank = (count, key[1] != prefer, place)
            if best is None or rank < best:
                best, chosen = rank, key
    if chosen is None:
        return None
    count, first = tally.votes[chosen] + coming[chosen], tally.lefts[chosen] + lefts[chosen]
    item, question = chosen
    if 2 * first == count:
        return Asked(item, question, _side(tally.study, item, question))
    return Asked(item, question, 0 if 2 * first < count else 1)

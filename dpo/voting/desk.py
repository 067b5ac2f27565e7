"""The desk of a running study: who comes in, what each is asked, and what becomes of the answers. It knows no network."""

from __future__ import annotations

import hmac
import re
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from dpo.voting import raters, shown
from dpo.voting.answers import Answer, Choice, Journal, Undo, standing
from dpo.voting.asking import Asked, Tally, following, progress, wanted
from dpo.voting.study import Item, Study

AWAY = 300.0  # seconds without a word after which the questions that a rater holds are given to others
AHEAD = 2  # questions a rater holds: the one shown, and the next, whose images are loaded meanwhile
MOST_RATERS = 1000
MOST_CODES = 8192  # addresses of images that are valid at a time
ID = re.compile(r"[0-9a-f]{32}")
LONG_AGO = 86400.0  # seconds that an answer can have taken


class Refused(Exception):
    """A request that is not granted: an HTTP status and one line for the page."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Desk:
    """A study in progress. Its methods are called from several threads, and one works at a time.

    invited: names with links of their own, who alone may vote then. closed: everybody needs a link.
    """

    def __init__(
        self,
        study: Study,
        secret: bytes,
        journal: Journal,
        invited: Sequence[str] = (),
        closed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study, self._secret, self._journal, self._clock = study, secret, journal, clock
        self._invited = {raters.key_of(secret, name): name for name in invited}
        self._everybody = raters.key_of_all(secret) if closed else None
        self._items = {item.id: item for item in study.items}
        self._questions = {question.key: question for question in study.questions}
        self.tally = Tally(study, standing(journal.lines))
        self._owner = {line.id: line.rater for line in journal.lines if isinstance(line, Answer)}
        self._names = {name.casefold(): name for name in (*self._owner.values(), *invited)}
        self._held: dict[str, list[Asked]] = defaultdict(list)
        self._heard: dict[str, float] = {}
        self._codes: OrderedDict[str, tuple[Item, Literal[0, 1]]] = OrderedDict()
        self._lock = threading.Lock()

    # --- who comes in

    def enter(self, link: str, name: str) -> dict[str, Any]:
        """What stands before the first question, and, where it is known who came, the rater's name and key.

        link: the key in a link, or "". name: as typed, or "". Raises Refused.
        """
        with self._lock:
            known = self._invited.get(link)
            if known is None and self._invited:
                raise Refused(403, "this study is open by personal link alone: ask for yours")
            if (
                known is None
                and self._everybody is not None
                and not hmac.compare_digest(link.encode(), self._everybody.encode())
            ):
                raise Refused(403, "this study is open by link alone: ask for it")
            if known is None and name:
                clean = raters.cleaned(name)
                if clean is None:
                    raise Refused(400, f"a name has 1 to {raters.LONGEST} characters that can be printed")
                if clean.casefold() not in self._names and len(self._names) >= MOST_RATERS:
                    raise Refused(403, f"this study has {MOST_RATERS} raters and takes no more")
                known = self._names.setdefault(clean.casefold(), clean)
            return {
                "title": self.study.title,
                "instructions": self.study.instructions,
                "notice": self.study.notice,
                "tie": self.study.tie,
                "rater": known,
                "key": None if known is None else raters.key_of(self._secret, known),
            }

    def _admit(self, rater: str, key: str) -> None:
        """Raises Refused for somebody who did not come in, or may not any more."""
        right = raters.key_of(self._secret, rater)
        if not hmac.compare_digest(right.encode(), key.encode()) or (self._invited and right not in self._invited):
            raise Refused(403, "unknown rater: open the page anew")
        self._names.setdefault(rater.casefold(), rater)
        self._heard[rater] = self._clock()

    # --- what is asked

    def following(self, rater: str, key: str) -> dict[str, Any]:
        """What the rater sees now: the same until it is answered. Raises Refused."""
        with self._lock:
            self._admit(rater, key)
            return self._next(rater)

    def _next(self, rater: str) -> dict[str, Any]:
        now = self._clock()
        others = [
            (name, asked)
            for name, held in self._held.items()
            if name != rater and now - self._heard.get(name, now - AWAY) < AWAY
            for asked in held
        ]
        mine = self._held[rater] = [asked for asked in self._held[rater] if self._is_open(rater, asked, others)]
        while len(mine) < AHEAD:
            more = following(self.tally, rater, [*others, *((rater, asked) for asked in mine)])
            if more is None:
                break
            mine.append(more)
        far, given = progress(self.tally, rater), self.tally.given[rater]
        reply: dict[str, Any] = {"done": far.done, "left": far.left, "last": given[-1].id if given else None}
        if not mine:
            return {**reply, "state": "wait" if wanted(self.tally, rater) else "done"}
        ahead = [address for asked in mine[1:AHEAD] for address in self._addresses(rater, asked)]
        return {**reply, "state": "question", "question": self._shown(rater, mine[0]), "ahead": ahead}

    def _is_open(self, rater: str, asked: Asked, others: Sequence[tuple[str, Asked]]) -> bool:
        """Whether a question that the rater holds is still to be asked."""
        if not self._is_unanswered(rater, asked):
            return False
        key = asked.item, asked.question
        coming = sum((held.item, held.question) == key and not held.repeat for _, held in others)
        is_vote = self.tally.kinds[asked.item] == "vote" and not asked.repeat
        return not is_vote or self.tally.votes[key] + coming < self.study.votes

    def _shown(self, rater: str, asked: Asked) -> dict[str, Any]:
        item = self._items[asked.item]
        return {
            "item": item.id,
            "question": asked.question,
            "text": self._questions[asked.question].text,
            "prompt": item.prompt,
            "images": self._addresses(rater, asked),
            "ticket": self._ticket(rater, asked),
        }

    def _addresses(self, rater: str, asked: Asked) -> list[str]:
        """Addresses of the left and the right image, valid from now on."""
        found = []
        for which in (asked.left, 1 - asked.left):
            code = shown.code(self._secret, rater, asked.item, which)
            self._codes[code] = self._items[asked.item], 1 if which else 0
            self._codes.move_to_end(code)
            found.append(f"/image/{code}.png")
        while len(self._codes) > MOST_CODES:
            self._codes.popitem(last=False)
        return found

    def image(self, code: str) -> tuple[Item, Literal[0, 1]]:
        """The image behind an address. Raises Refused."""
        with self._lock:
            if code not in self._codes:
                raise Refused(404, "no image is here")
            return self._codes[code]

    def _ticket(self, rater: str, asked: Asked) -> str:
        """What shows that this was asked of the rater, and how, without telling it."""
        text = f"ticket\0{rater}\0{asked.item}\0{asked.question}\0{asked.left}\0{asked.repeat}"
        return hmac.digest(self._secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:32]

    # --- what is answered

    def answer(self, rater: str, key: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps an answer, once, and says what comes next.

        said: id, item, question, ticket, choice ("left", "right" or "tie") and seconds. Raises Refused, and UserError or
        OSError where it cannot be written.
        """
        with self._lock:
            self._admit(rater, key)
            if not ID.fullmatch(said["id"]):
                raise Refused(400, "id needs 32 hexadecimal digits")
            if not 0 <= said["seconds"] <= LONG_AGO:
                raise Refused(400, f"seconds need a number from 0 to {LONG_AGO:.0f}")
            if said["item"] not in self._items or said["question"] not in self._questions:
                raise Refused(404, "no such question")
            if said["choice"] not in ("left", "right", "tie"):
                raise Refused(400, "choice is left, right or tie")
            if said["choice"] == "tie" and not self.study.tie:
                raise Refused(400, "this study has no ties: choose left or right")
            if self._owner.get(said["id"], rater) != rater:
                raise Refused(409, "this id belongs to another answer")
            asked = self._asked(rater, said)
            if said["id"] not in self._owner and self._is_unanswered(rater, asked):
                self._keep(rater, asked, said)
            return self._next(rater)

    def _asked(self, rater: str, said: Mapping[str, Any]) -> Asked:
        """What the ticket of an answer was made for. Raises Refused."""
        for left in (0, 1):
            for repeat in (False, True):
                asked = Asked(said["item"], said["question"], 1 if left else 0, repeat)
                if hmac.compare_digest(self._ticket(rater, asked).encode(), said["ticket"].encode()):
                    return asked
        raise Refused(403, "this question was not asked of you")

    def _is_unanswered(self, rater: str, asked: Asked) -> bool:
        key = asked.item, asked.question
        if asked.repeat:
            return key in self.tally.asked[rater] and key not in self.tally.repeated[rater]
        return key not in self.tally.asked[rater]

    def _keep(self, rater: str, asked: Asked, said: Mapping[str, Any]) -> None:
        right = said["choice"] == "right"
        choice: Choice = "tie" if said["choice"] == "tie" else "second" if right == (asked.left == 0) else "first"
        answer = Answer(
            id=said["id"],
            rater=rater,
            item=asked.item,
            question=asked.question,
            choice=choice,
            left=asked.left,
            repeat=asked.repeat,
            seconds=round(float(said["seconds"]), 3),
            at=_now(),
        )
        self._journal.add(answer)
        self._owner[answer.id] = rater
        self.tally.add(answer)

    def undo(self, rater: str, key: str, id: str) -> dict[str, Any]:
        """Takes the rater's last answer back, which has this id, and asks it again. Raises as `answer` does.

        An id that is not the last one any more changes nothing: another tab went on.
        """
        with self._lock:
            self._admit(rater, key)
            if self._owner.get(id) != rater:
                raise Refused(404, "no such answer of yours")
            given = self.tally.given[rater]
            if given and given[-1].id == id:
                answer = given[-1]
                self._journal.add(Undo(id, rater, _now()))
                self.tally.take_back(answer)
                asked = Asked(answer.item, answer.question, answer.left, answer.repeat)
                self._held[rater].insert(0, asked)
            return self._next(rater)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

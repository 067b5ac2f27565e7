"""Simulated studies: raters with known preferences vote on prompts that differ in a known way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from dpo.voting.answers import CHOICES, Answer, Choice
from dpo.voting.study import Item, Question, Rule, Study

NORMAL = NormalDist()


def alike(share: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Every prompt has this share of votes for the later model."""
    return lambda generator, count: np.full(count, share)


def beta(a: float, b: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Shares of votes that differ between prompts as Beta(a, b)."""
    return lambda generator, count: generator.beta(a, b, count)


def study(prompts: int, *, votes: int = 5, sides: Sequence[str] = ("start", "dpo"), **more) -> Study:
    """A study of so many prompts with two images each; more: items of other kinds in `extra`, fields of Study."""
    extra = more.pop("extra", ())
    pairs = [(a, b) for b in range(len(sides)) for a in range(b)]
    items = tuple(
        Item(f"i{n}", f"prompt {n}", "", "vote", pair if n % 2 else pair[::-1], (f"a{n}.png", f"b{n}.png"), ("", ""))
        for n in range(prompts)
        for pair in [pairs[n % len(pairs)]]
    )
    plain = {
        "name": "trial", "seed": 0, "title": "A trial", "instructions": "Choose.", "notice": "",
        "questions": (Question("general", "Which do you prefer?"),), "tie": False, "repeats": 0.0, "rule": Rule(),
    }  # fmt: skip
    return Study(**{**plain, **more}, votes=votes, sides=tuple(sides), items=(*items, *extra))


def vote(
    of: Study,
    chance: Callable[[np.random.Generator, int], np.ndarray],
    seed: int,
    *,
    raters: int = 10,
    apart: float = 0.0,
    ties: float = 0.0,
    always: Mapping[str, str] = {},
) -> list[Answer]:
    """Answers to every question of a study: `of.votes` raters an item, taken at random.

    chance: the share of votes that the later model gets at a prompt from all raters there could be. apart: how far
    raters differ, in standard deviations of a single vote (their shares' mean stays). ties: share of "can't tell".
    always: raters who always answer "left" or "right". A share `of.repeats` of votes is asked again, and checks with
    a broken image are answered rightly by all but those.
    """
    generator = np.random.default_rng(seed)
    names = [f"rater {n}" for n in range(raters)]
    lean = generator.normal(0, apart, raters)
    answers: list[Answer] = []

    def add(rater: str, item: Item, question: str, later: bool | None, repeat: bool, left: int) -> None:
        choice: Choice = "tie" if later is None else CHOICES[(item.sides[1] > item.sides[0]) == later]
        if rater in always:
            choice = CHOICES[left if always[rater] == "left" else 1 - left]
        seconds = round(float(generator.lognormal(1.0, 0.5)), 2)
        answers.append(
            Answer(
                f"a{len(answers)}", rater, item.id, question, choice, 1 if left else 0, repeat, seconds, "2026-01-01"
            )
        )

    for question in of.questions:
        shares = dict(zip((one.id for one in of.items), np.clip(chance(generator, len(of.items)), 1e-9, 1 - 1e-9)))
        for item in of.items:
            stood = generator.permutation(np.arange(of.votes) % 2)
            for place, who in enumerate(generator.permutation(raters)[: of.votes]):
                if item.kind != "vote":
                    later = item.kind == "broken" or bool(generator.random() < 0.5)
                    add(names[who], item, question.key, later, False, int(stood[place]))
                    continue
                level = NORMAL.inv_cdf(float(shares[item.id])) * math.hypot(1, apart) + lean[who]
                for repeat in (False, True)[: 1 + (generator.random() < of.repeats)]:
                    later = bool(generator.random() < NORMAL.cdf(level))
                    left = int(stood[place]) ^ repeat
                    add(names[who], item, question.key, None if generator.random() < ties else later, repeat, left)
    return answers


def majority(chance: Callable[[np.random.Generator, int], np.ndarray], votes: int = 5, seed: int = 0) -> float:
    """The share of prompts that most of `votes` raters decide for the later model, of a million prompts."""
    p = chance(np.random.default_rng(seed), 1_000_000)
    return float(
        sum(
            math.comb(votes, k) * p**k * (1 - p) ** (votes - k) * (1.0 if 2 * k > votes else 0.5 * (2 * k == votes))
            for k in range(votes + 1)
        ).mean()
    )

"""What a study can show, before anybody votes.

The majority of the raters makes one outcome of a prompt, so its win rate is a share of prompts: how sure it is depends on
prompts alone, however many vote on each. Votes on a prompt only bring its majority nearer to what all people would say.

How much votes have in common is the agreement, Krippendorff's alpha. With two choices and shares of votes that differ
between prompts as Beta(a, b), it is 1 / (a + b + 1); that gives the majority's win rate from the votes'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from dpo.common.errors import UserError
from dpo.scorers.compare import detectable
from dpo.voting import answers, study, tally
from dpo.voting.agreement import alpha as krippendorff

EXACTLY = (
    "Chances are of one question, by a normal approximation; the report's sign test is exact and wants some prompts in a hundred "
    "more, and several questions, which it adjusts p for, more again."
)
NORMAL = NormalDist()
LEVEL, POWER = 0.95, 0.80
Z = NORMAL.inv_cdf((1 + LEVEL) / 2)
WIDTH = 0.05  # the half interval that is planned for
BETA = (3, 2)  # how shares of votes differ between prompts where nobody has measured it: 60 % of votes in the mean
ASSUMED = 1 / (sum(BETA) + 1)  # the agreement of that
MOST = 100_000  # prompts or votes of a plan
USUAL = 200  # prompts, as an example
EACH = (1, 3, 5, 7, 9)  # votes on a prompt that are compared


def for_width(half: float, share: float = 0.5) -> int:
    """Prompts that give a share the interval +- `half`."""
    return math.ceil(Z**2 * share * (1 - share) / half**2)


def width(prompts: float, share: float = 0.5) -> float:
    """Half of the interval of a share of so many prompts."""
    return Z * math.sqrt(share * (1 - share) / prompts)


def to_show(share: float, power: float = POWER) -> int:
    """Prompts by which a true share other than one half is shown to be other, with this power."""
    spread = Z * 0.5 + NORMAL.inv_cdf(power) * math.sqrt(share * (1 - share))
    return math.ceil((spread / (share - 0.5)) ** 2)


def power(prompts: int, share: float) -> float:
    """The chance that so many prompts show that a true share above one half is above it."""
    if share >= 1:
        return float(prompts > Z**2)
    return NORMAL.cdf(((share - 0.5) * math.sqrt(prompts) - Z * 0.5) / math.sqrt(share * (1 - share)))


def majority(share: float, votes: int, alpha: float = 0.0) -> float:
    """The majority's win rate where a model gets `share` of all votes, `votes` of them on a prompt; a tie is one half.

    alpha: the agreement, 0 for prompts that are alike, 1 for people who always agree.
    """
    if alpha >= 1 or share in (0.0, 1.0):
        return share

    def chance(k: int) -> float:
        if alpha <= 0:
            return math.comb(votes, k) * share**k * (1 - share) ** (votes - k)
        a, b = (part * (1 / alpha - 1) for part in (share, 1 - share))
        return math.comb(votes, k) * math.exp(_beta(k + a, votes - k + b) - _beta(a, b))

    return sum(chance(k) * (1.0 if 2 * k > votes else 0.5 * (2 * k == votes)) for k in range(votes + 1))


def _beta(a: float, b: float) -> float:
    """The logarithm of Euler's beta function."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


class Split(NamedTuple):
    """One way to spend votes."""

    votes: int  # on a prompt
    prompts: int
    majority: float  # its win rate
    power: float  # the chance that it is shown to be above one half
    half: float  # of the interval of the votes' win rate


def splits(budget: int, share: float, alpha: float, most: int | None = None) -> list[Split]:
    """The ways to spend a budget of votes on one question; `most`: prompts that there are."""
    each = sorted({*EACH, *([budget // most] if most and budget > most else [])})
    found = []
    for votes in each:
        prompts = min(budget // votes, most or budget)
        if prompts:
            rate = majority(share, votes, alpha)
            half = Z * math.sqrt(share * (1 - share) * (alpha + (1 - alpha) / votes) / prompts)
            found.append(Split(votes, prompts, rate, power(prompts, rate), half))
    return found


def measured(folder: Path) -> tuple[float, int]:
    """The agreement of a pilot's votes, ties left out, and how many votes that is. Raises UserError.

    Questions are measured each by itself and averaged by their votes; raters that the study's rule leaves out do not count.
    """
    declared = study.read(folder)
    given = [one for one in answers.read(folder) if one.choice != "tie"]
    without = tally.left_out(declared, answers.read(folder))
    found = [
        krippendorff(tally.votes(declared, given, question.key, pair, without))
        for question in declared.questions
        for pair in tally.pairs(declared)
    ]
    known = [(one.alpha, one.votes) for one in found if one.alpha is not None]
    if not known:
        raise UserError(
            f"{folder} measures no agreement: it needs items with two votes or more that are not all the same"
        )
    votes = sum(count for _, count in known)
    return min(max(sum(alpha * count for alpha, count in known) / votes, 0.0), 1.0), votes


def lines(
    *,
    prompts: int | None = None,
    votes: int = 5,
    budget: int | None = None,
    share: float = 0.6,
    agreement: float | None = None,
    pilot: Path | None = None,
) -> list[str]:
    """What a study can show, as lines for the console.

    prompts: as many as there are; None: not decided. votes: for each prompt and question. budget: votes in all, for one
    question; None: not decided. share: of the votes that the better model is thought to get. agreement: Krippendorff's
    alpha between raters, assumed; None: measured in `pilot`, the folder of a study with votes, else that of people
    whose opinions differ between prompts as Beta(3, 2) does. Raises UserError.
    """
    _check(prompts, votes, budget, share, agreement)
    alpha, why = _agreement(agreement, pilot)
    alike, differ = majority(share, votes), majority(share, votes, alpha)
    found = [
        "The majority of a prompt's raters is one outcome, so its win rate needs prompts, however many vote on each:",
        f"  +-{WIDTH:.0%} points: {for_width(WIDTH)} prompts ({for_width(WIDTH, 2 / 3)} where one model wins two thirds)".replace(
            "%", ""
        ),
        *(f"  to show {rate:.0%} against 50% four times in five: {to_show(rate)} prompts" for rate in (0.55, 0.60)),
        *_of_prompts(prompts or USUAL),
        f"A majority is no vote: {share:.0%} of the votes, {votes} on a prompt, make {alike:.0%} of the majorities where prompts "
        f"are alike, {differ:.0%} where they differ so much that agreement (alpha) is {alpha:.2f}, {why}.",
    ]
    if prompts is not None and budget is None:
        found += [
            f"{prompts * votes:,} votes a question: {power(prompts, differ):.0%} chance to show that the majority is above one half."
        ]
    if budget is not None:
        found += _of_budget(budget, share, alpha, prompts)
    return [*found, EXACTLY]


def _check(prompts: int | None, votes: int, budget: int | None, share: float, agreement: float | None) -> None:
    for name, count in (("prompts", prompts), ("votes", votes), ("budget", budget)):
        if count is not None and not 1 <= count <= MOST:
            raise UserError(f"a plan of {count:,} {name}: give 1 to {MOST:,}")
    if not 0.5 < share < 1:
        raise UserError(
            f"a plan for a share of {share:g}: give one between 0.5 and 1, of the votes for the better model"
        )
    if agreement is not None and not 0 <= agreement <= 1:
        raise UserError(f"an agreement of {agreement:g}: give one between 0 and 1")


def _agreement(given: float | None, pilot: Path | None) -> tuple[float, str]:
    """The agreement to plan with, and where it is from."""
    if given is not None:
        return given, "as given"
    if pilot is None:
        return ASSUMED, f"assumed: that of Beta{BETA}; a pilot would measure it"
    alpha, votes = measured(pilot)
    return alpha, f"measured on {votes:,} votes in {pilot}"


def _of_prompts(prompts: int) -> Sequence[str]:
    shown = detectable(prompts)
    most = "too few to show anything" if shown is None else f"they show a win rate of {shown:.0%} four times in five"
    return [f"  {prompts:,} prompts: +-{100 * width(prompts):.0f} points; {most}"]


def _of_budget(budget: int, share: float, alpha: float, most: int | None) -> list[str]:
    """A table of the ways to spend the votes, and which is best."""
    ways = splits(budget, share, alpha, most)
    best = max(ways, key=lambda way: (round(way.power, 3), -way.votes))
    found = [
        f"{budget:,} votes on a question can be spent so:",
        "  votes each | prompts | majority's win rate | chance to show it | votes' win rate",
    ]
    for way in ways:
        found.append(
            f"  {way.votes:10d} | {way.prompts:7,d} | {way.majority:19.1%} | {way.power:17.0%} | "
            f"{share:.0%} +-{100 * way.half:.1f} points"
        )
    text = f"Prompts before votes per prompt: best are {best.prompts:,} prompts with {best.votes} {'vote' if best.votes == 1 else 'votes'} each"
    limited = most is not None and best.prompts == most and best.votes > 1
    return [*found, f"{text}, as there are no more prompts." if limited else f"{text}."]

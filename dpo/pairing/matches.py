"""From matches to strengths: a tournament's images, by who won against whom (R. Bradley and M. Terry, 1952)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from os.path import normpath
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo.common.errors import UserError
from dpo.common.stats import bradley_terry
from dpo.data.labels import flag
from dpo.pairing.ranked import NO_PROMPT, Ranking, Row, gathered, prompt_of


class Match(NamedTuple):
    """One comparison of two images."""

    where: str
    winner: Path
    loser: Path
    tie: bool  # then neither won
    prompt: str
    group: str | None


def is_tie(value: object, where: str) -> bool:
    """What a cell of the column of ties says; an empty one says no. Raises UserError for neither yes nor no."""
    try:
        return bool(flag(value, "tie"))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def ranking(played: Sequence[Match], counts: Counter[str]) -> Ranking:
    """The images with their strengths, compared where matches connect them.

    Images of a prompt (or group) that no chain of matches connects are in different groups: nobody compared them. Raises
    UserError for a group with two prompts, and an image that is matched with itself.
    """
    groups: dict[str, list[Match]] = {}
    for match in played:
        name = match.prompt if match.group is None else match.group
        if name:
            groups.setdefault(name, []).append(match)
        else:
            counts[NO_PROMPT] += 1
    rated = {name: _rated(name, found) for name, found in groups.items()}
    ranked = gathered("strength", True, [row for rows in rated.values() for row in rows], counts)
    images = zip(ranked.group.tolist(), map(normpath, ranked.images), strict=True)
    place = {(ranked.groups[group], image): i for i, (group, image) in enumerate(images)}
    even = set()
    for name, found in groups.items():
        part = {row.image: str(row.group) for row in rated[name]}
        for pair in _even(found):
            there = sorted(place[part[one], normpath(one)] for one in pair if (part[one], normpath(one)) in place)
            if len(there) == 2:  # both files are
                even.add((there[0], there[1]))
    return replace(ranked, even=frozenset(even))


def _even(found: Sequence[Match]) -> list[tuple[Path, Path]]:
    """The images that met and of which neither won more often."""
    balance: Counter[tuple[Path, Path]] = Counter()
    for match in found:
        one, other = sorted((match.winner, match.loser))
        balance[one, other] += 0 if match.tie else 1 if match.winner == one else -1
    return [pair for pair, won in balance.items() if won == 0]


def _rated(name: str, found: Sequence[Match]) -> list[Row]:
    images = list(dict.fromkeys(image for match in found for image in (match.winner, match.loser)))
    number = {image: place for place, image in enumerate(images)}
    ends = [(number[match.winner], number[match.loser]) for match in found]
    wins = np.zeros((len(images), len(images)))
    for (winner, loser), match in zip(ends, found, strict=True):
        if winner == loser:
            raise UserError(f"{match.where}: an image is matched with itself: mend or delete the line")
        wins[winner, loser] += 0.5 if match.tie else 1.0
        wins[loser, winner] += 0.5 if match.tie else 0.0
    prompt = prompt_of(name, ((match.where, match.prompt) for match in found))
    part = _parts(len(images), ends)
    values = strengths(wins)
    first = {place: match for match, pair in zip(found[::-1], ends[::-1], strict=True) for place in pair}
    return [
        Row(
            first[place].where,
            image,
            float(values[place]),
            prompt,
            name if max(part) == 0 else f"{name} (part {part[place] + 1})",
        )
        for place, image in enumerate(images)
    ]


def strengths(wins: np.ndarray) -> np.ndarray:
    """Log strengths [K] by wins [K, K] of each image (row) over each (column); a tie is half a win for both.

    Each image also has a tie with an image of strength 0 that nobody sees: without it one that never lost would have no
    finite strength.
    """
    padded = np.zeros((len(wins) + 1, len(wins) + 1))
    padded[1:, 1:] = wins
    padded[0, 1:] = padded[1:, 0] = 0.5
    found: np.ndarray = bradley_terry(padded[None])[0, 1:]
    return np.round(found, 6)  # the iteration ends at some 1e-10, and images with equal results are ties


def _parts(count: int, ends: Sequence[tuple[int, int]]) -> list[int]:
    """For each image the number of its part, from 0: images that a chain of matches connects have one."""
    part = list(range(count))
    for a, b in ends:
        low, high = sorted((part[a], part[b]))
        part = [low if one == high else one for one in part]
    known = {one: place for place, one in enumerate(dict.fromkeys(part))}
    return [known[one] for one in part]

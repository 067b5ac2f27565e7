"""Which images of a prompt are paired; everything random is keyed by prompt and images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import NamedTuple

import numpy as np

from dpo.common.words import digest

ROUNDING = 1e-12  # of two scores: 0.3 and 0.1 are 0.2 apart


def paired(
    prompts: Sequence[str],
    prompt: np.ndarray,
    scores: np.ndarray,
    uid: Callable[[int], str],
    *,
    pairing: str,
    per_prompt: int,
    min_margin: float,
    seed: int,
) -> list[tuple[int, int]]:
    """(first, second) image of every pair, prompt by prompt; what stands first is keyed, so that it tells nothing.

    prompts: texts; prompt: int64 [M], that of each image; scores: [M], nan for images that are not paired; uid: of an
    image, the same for equal ones, which are never paired. best-worst: the best image with the worst; all: every two;
    random: `per_prompt` of all, chosen by a hash. In each case only pairs whose scores differ by `min_margin` or more.
    """
    found: list[tuple[int, int]] = []
    for images in _by_prompt(prompt, scores):
        text = prompts[int(prompt[images[0]])]
        wide = [
            (a, b)
            for a, b in _candidates(images, scores, pairing)
            if _apart(scores, a, b) >= min_margin and uid(a) != uid(b)
        ]
        if pairing == "random":
            wide = _first_by_hash(wide, text, uid, seed)[:per_prompt]
            wide.sort(key=lambda pair: _place(pair, images))
        found += [_sided(pair, text, uid, seed) for pair in wide]
    return found


@dataclass(frozen=True)
class Rule:
    """Which pairs of images are wanted."""

    pairing: str = "all"  # or "neighbours", "best-worst"
    min_margin: float = 0.0
    most: int | None = None  # pairs of one prompt that an image is in
    seed: int = 0


class Preferred(NamedTuple):
    """Pairs of images, the better one first, and how many more there would have been."""

    pairs: list[tuple[int, int]]
    ties: int  # two images of a prompt that are equally good
    narrow: int  # less than the margin apart
    same: int  # an image with its equal
    crowded: int  # of images that are in enough pairs


def preferred(
    prompts: Sequence[str],
    prompt: np.ndarray,
    scores: np.ndarray,
    uid: Callable[[int], str],
    rule: Rule,
    even: Collection[tuple[int, int]] = (),
) -> Preferred:
    """The pairs of M images by their scores, higher is better, prompt by prompt and in the images' order; no ties.

    prompts, prompt, scores, uid: as for `paired`. neighbours: every image of a score with every one of the next lower
    score; best-worst: the first of the best with the last of the worst. Of an image with more than `rule.most` pairs a
    hash chooses those that stay. even: images a < b that are a tie whatever their scores, which may come from others.
    """
    found: list[tuple[int, int]] = []
    lost: Counter[str] = Counter()
    for images in _by_prompt(prompt, scores):
        text = prompts[int(prompt[images[0]])]
        wide = []
        lost["ties"] += sum(len(level) * (len(level) - 1) // 2 for level in _levels(images, scores))
        for pair in _candidates(images, scores, rule.pairing):
            better, worse = pair if scores[pair[0]] > scores[pair[1]] else pair[::-1]
            if _is_tie(scores, better, worse):
                continue
            if (min(pair), max(pair)) in even:
                lost["ties"] += 1
            elif _apart(scores, better, worse) < rule.min_margin:
                lost["narrow"] += 1
            elif uid(better) == uid(worse):
                lost["same"] += 1
            else:
                wide.append((better, worse))
        kept = wide if rule.most is None else _thinned(_first_by_hash(wide, text, uid, rule.seed), rule.most)
        lost["crowded"] += len(wide) - len(kept)
        found += sorted(kept, key=lambda pair: _place(pair, images))
    return Preferred(found, lost["ties"], lost["narrow"], lost["same"], lost["crowded"])


def how_many(prompt: np.ndarray, scores: np.ndarray, pairing: str) -> int:
    """The pairs that `preferred` would look at, ties left out, before anything is known of the images."""
    total = 0
    for images in _by_prompt(prompt, scores):
        sizes = [len(level) for level in _levels(images, scores)]
        if pairing == "all":
            total += (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
        elif pairing == "neighbours":
            total += sum(low * high for low, high in pairwise(sizes))
        else:
            total += len(sizes) > 1
    return total


def _by_prompt(prompt: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """The images of each prompt that have a score, in their order."""
    order = np.argsort(prompt, kind="stable")
    order = order[np.isfinite(scores[order])]
    starts = np.flatnonzero(np.diff(prompt[order], prepend=-1))
    return np.split(order, starts[1:]) if len(order) else []


def _candidates(images: np.ndarray, scores: np.ndarray, pairing: str) -> Iterator[tuple[int, int]]:
    if pairing == "neighbours":
        for low, high in pairwise(_levels(images, scores)):
            yield from product(high, low)
    elif pairing == "best-worst":
        values = scores[images]
        best, worst = int(images[values.argmax()]), int(images[len(values) - 1 - values[::-1].argmin()])
        if best != worst:
            yield best, worst
    else:
        yield from combinations(images.tolist(), 2)


def _levels(images: np.ndarray, scores: np.ndarray) -> list[list[int]]:
    """The images that are equally good, from the worst to the best."""
    order = images[np.argsort(scores[images], kind="stable")]
    steps = [not _is_tie(scores, a, b) for a, b in pairwise(order.tolist())]
    return [level.tolist() for level in np.split(order, np.flatnonzero(steps) + 1)]


def _apart(scores: np.ndarray, a: int, b: int) -> float:
    """How far two scores are apart, in doubt a little more."""
    return float(abs(scores[a] - scores[b]) + _rounding(scores, a, b))


def _is_tie(scores: np.ndarray, a: int, b: int) -> bool:
    return bool(abs(scores[a] - scores[b]) <= _rounding(scores, a, b))


def _rounding(scores: np.ndarray, a: int, b: int) -> float:
    return float(ROUNDING * max(abs(scores[a]), abs(scores[b])))


def _first_by_hash(
    pairs: Sequence[tuple[int, int]], text: str, uid: Callable[[int], str], seed: int
) -> list[tuple[int, int]]:
    return sorted(pairs, key=lambda pair: digest("pair", str(seed), text, *sorted(map(uid, pair))))


def _thinned(pairs: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """The pairs from first to last, but for those of an image that is in `most` already."""
    times: Counter[int] = Counter()
    kept = []
    for pair in pairs:
        if max(times[image] for image in pair) < most:
            kept.append(pair)
            times.update(pair)
    return kept


def _place(pair: tuple[int, int], images: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(np.searchsorted(images, pair).tolist()))


def _sided(pair: tuple[int, int], text: str, uid: Callable[[int], str], seed: int) -> tuple[int, int]:
    a, b = sorted(pair, key=uid)
    return (a, b) if int(digest("side", str(seed), text, uid(a), uid(b))[:8], 16) % 2 else (b, a)

"""Which images of a prompt are paired, and on which side each stands; everything random is keyed by prompt and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

from dpo.common.words import digest

PAIRINGS = ("best-worst", "all", "random")


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
    order = np.argsort(prompt, kind="stable")
    order = order[np.isfinite(scores[order])]
    starts = np.flatnonzero(np.diff(prompt[order], prepend=-1))
    found: list[tuple[int, int]] = []
    for images in np.split(order, starts[1:]) if len(order) else []:
        text = prompts[int(prompt[images[0]])]
        wide = [
            (a, b)
            for a, b in _candidates(images, scores, pairing)
            if abs(scores[a] - scores[b]) >= min_margin and uid(a) != uid(b)
        ]
        if pairing == "random":
            keys = {pair: digest("pair", str(seed), text, *sorted(map(uid, pair))) for pair in wide}
            chosen = set(sorted(wide, key=keys.__getitem__)[:per_prompt])
            wide = [pair for pair in wide if pair in chosen]
        found += [_sided(pair, text, uid, seed) for pair in wide]
    return found


def _candidates(images: np.ndarray, scores: np.ndarray, pairing: str) -> Iterator[tuple[int, int]]:
    if pairing != "best-worst":
        yield from combinations(images.tolist(), 2)
        return
    values = scores[images]
    best, worst = int(images[values.argmax()]), int(images[len(values) - 1 - values[::-1].argmin()])
    if best != worst:
        yield best, worst


def _sided(pair: tuple[int, int], text: str, uid: Callable[[int], str], seed: int) -> tuple[int, int]:
    a, b = sorted(pair, key=uid)
    return (a, b) if int(digest("side", str(seed), text, uid(a), uid(b))[:8], 16) % 2 else (b, a)

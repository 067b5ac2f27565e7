"""A number for all images of a side together, beside the base's: one side after the other, and how surely they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo.common.errors import UserError
from dpo.evaluating.result import Measure
from dpo.evaluating.sides import Side
from dpo.scorers.compare import Interval, mean_interval
from dpo.scorers.sets import OverPrompts, SetScorer


@dataclass(frozen=True)
class Found:
    """What a scorer says of the images of a side together."""

    value: float
    interval: Interval | None
    images: int  # that it saw
    by_prompt: Mapping[str, float] | None  # None where the number is no mean over prompts


def of_side(side: Side, features: np.ndarray, hashes: Mapping[Path, str], scorer: SetScorer) -> Found:
    """The number of a side, from features float32 [N, D]; an image with a row that is not finite is left out.

    hashes: of the images' pixels, which make the number that of a set: the order of its files plays no part. Raises
    UserError where the images are too few, or the number is not finite.
    """
    kept = np.flatnonzero(np.isfinite(features).all(1))
    if not features.shape[1] or not len(kept):
        raise UserError(f"{scorer.name} can use no image of {side.name}")
    order = sorted(kept, key=lambda place: (side.images[place].prompt, hashes[side.images[place].path]))
    texts, prompts = np.unique(
        np.array([side.images[place].prompt for place in order], dtype=object), return_inverse=True
    )
    rows = torch.from_numpy(features[order])
    value, interval = scorer.score(rows, prompts)
    if not math.isfinite(value):
        raise UserError(f"{scorer.name} gave no finite number to the images of {side.name}")
    by_prompt = None
    if isinstance(scorer, OverPrompts):
        numbers, values = scorer.by_prompt(rows, prompts)
        by_prompt = dict(zip(texts[numbers].tolist(), values.tolist(), strict=True))
    return Found(value, interval, len(order), by_prompt)


def difference(base: Found, other: Found) -> tuple[float, Interval | None] | None:
    """By how much `other` is higher, and the 95 % interval; None where the two cannot be compared.

    Where the number is a mean over prompts it is that of the prompts which both have, prompt by prompt. Elsewhere the
    sets must be of one size, which the number depends on; their errors then count as independent.
    """
    if base.by_prompt is not None and other.by_prompt is not None:
        both = sorted(base.by_prompt.keys() & other.by_prompt.keys())
        gaps = np.array([other.by_prompt[prompt] - base.by_prompt[prompt] for prompt in both])
        return (math.fsum(gaps) / len(gaps), mean_interval(gaps)) if both else None
    if base.images != other.images:
        return None
    gap = other.value - base.value
    if base.interval is None or other.interval is None:
        return gap, None
    half = math.hypot(*((high - low) / 2 for low, high in (base.interval, other.interval)))
    return gap, (gap - half, gap + half)


def entries(measure: Measure, base: str, found: Mapping[str, Found]) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of "sets" of one scorer, from what it says of each side by name, the base's too; and cautions."""
    made: list[dict[str, Any]] = []
    lines: list[str] = []
    for name, one in found.items():
        apart = None
        if name != base and base in found:
            apart = difference(found[base], one)
            if apart is None:
                lines.append(
                    f"{measure.name} saw {found[base].images} images of {base} and {one.images} of {name}, which cannot be "
                    "compared: draw both alike"
                )
        entry = {
            "scorer": measure.name,
            "side": name,
            "value": one.value,
            "interval": None if one.interval is None else list(one.interval),
            "images": one.images,
            "difference": None if apart is None else apart[0],
            "difference_interval": None if apart is None or apart[1] is None else list(apart[1]),
        }
        made.append(entry)
        lines += _fallen(entry, base, measure)
    return made, lines


def _fallen(entry: Mapping[str, Any], base: str, measure: Measure) -> Sequence[str]:
    """A line where a side is surely worse than the base."""
    if entry["difference_interval"] is None:
        return []
    low, high = entry["difference_interval"]
    falls, rises = high < 0, low > 0
    if not (falls if measure.higher_is_better else rises):
        return []
    return [
        f"{measure.name} {'falls' if falls else 'rises'}: {entry['side']} has {entry['value']:.4g}, "
        f"{entry['difference']:+.4g} against {base} (95 % interval {low:+.4g} to {high:+.4g})"
    ]

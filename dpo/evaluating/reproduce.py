"""Published scores beside one's own: the protocol as far as it is stated, and how far two papers are apart."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from dpo.common.errors import UserError
from dpo.common.words import listed

UNSTATED = "unstated"


@dataclass(frozen=True)
class Published:
    """A table of scores and what its authors say of how they were made."""

    name: str
    title: str
    source: str
    statistic: str  # "mean" or "median", over images
    images_per_prompt: int
    protocol: Mapping[str, Any]  # UNSTATED where the authors do not say
    models: Mapping[str, Mapping[str, float]]  # score by model and scorer

    def stated(self) -> dict[str, Any]:
        """The settings that a run of the protocol must have."""
        return {name: value for name, value in self.protocol.items() if value != UNSTATED}


class Line(NamedTuple):
    """A score of one's own beside the published one."""

    model: str
    scorer: str
    ours: float
    published: float
    tolerance: float | None  # how far another paper's number of the same model is off; None where there is no other

    @property
    def difference(self) -> float:
        return self.ours - self.published


@cache
def tables() -> dict[str, Published]:
    """All tables by name."""
    text = resources.files("dpo.evaluating").joinpath("published.toml").read_text(encoding="utf-8")
    return {name: Published(name=name, **table) for name, table in tomllib.loads(text).items()}


def table(name: str) -> Published:
    """The table of that name. Raises UserError."""
    if name not in tables():
        raise UserError(f"--reproduce {name}: no such table; there are {', '.join(tables())}")
    return tables()[name]


def check(chosen: Published, models: Sequence[str], scorers: Sequence[str]) -> None:
    """Raises UserError unless the table has a number of one of these models by one of these scorers."""
    there = {model: chosen.models[model] for model in models if model in chosen.models}
    if not there:
        raise UserError(
            f"--reproduce {chosen.name} has none of these models: call one NAME=MODEL, with a name of {listed(chosen.models)}"
        )
    if not any(scorer in scores for scores in there.values() for scorer in scorers):
        known = dict.fromkeys(scorer for scores in there.values() for scorer in scores)
        raise UserError(
            f"--reproduce {chosen.name} has no numbers by {listed(scorers) or 'no scorer'}: it has those by {listed(known)}"
        )


def beside(chosen: Published, ours: Mapping[str, Mapping[str, float]]) -> list[Line]:
    """A line for each of `ours` (score by model and scorer) that the table has."""
    return [
        Line(model, scorer, value, chosen.models[model][scorer], _tolerance(chosen, model, scorer))
        for model, scores in ours.items()
        for scorer, value in scores.items()
        if scorer in chosen.models.get(model, {})
    ]


def _tolerance(chosen: Published, model: str, scorer: str) -> float | None:
    value = chosen.models[model][scorer]
    others = [other.models.get(model, {}).get(scorer) for other in tables().values() if other is not chosen]
    return max((abs(value - other) for other in others if other is not None), default=None)

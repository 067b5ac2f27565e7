"""Which scorer to trust: how often each one prefers the image that people prefer."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.common.errors import UserError, reading
from dpo.evaluating import result, scoring
from dpo.evaluating.sides import Shown, Side
from dpo.evaluating.work import CACHE
from dpo.scorers.cache import ScoreCache
from dpo.scorers.compare import mean_interval
from dpo.voting import tally
from dpo.voting.answers import Answer
from dpo.voting.rates import win_interval
from dpo.voting.study import Study

SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Judged:
    """What a scorer says of the items of a study."""

    scorer: str
    later: (
        np.ndarray
    )  # [items] float64: +1 where it prefers the image of the later model, -1, 0 for a tie; nan: not scored


def judged(study: Study, folder: Path, scores: Sequence[str]) -> list[Judged]:
    """The preferences of scorers on the items of a study in `folder`.

    scores: folders of evaluations, from which scores are taken by an image's pixels, or NAME=TABLE. Raises UserError.
    """
    found = [one for text in scores for one in _judged(study, folder, text)]
    names = [one.scorer for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--scores: two scorers are called {twice[0]}; give tables other names, NAME=TABLE")
    return found


def _judged(study: Study, folder: Path, text: str) -> list[Judged]:
    name, equals, table = text.partition("=")
    place = Path(text).expanduser()
    if place.is_dir():
        return _of_evaluation(study, place)
    if not equals or not name.strip() or not table.strip():
        raise UserError(f"--scores {text}: expected the folder of an evaluation, or NAME=TABLE")
    return [_of_table(study, folder, name.strip(), Path(table.strip()).expanduser())]


def _of_evaluation(study: Study, place: Path) -> list[Judged]:
    """Every scorer of images that an evaluation has numbers of for images of the study."""
    path, cache = place / result.FILE, place / CACHE
    if not path.is_file() or not cache.is_file():
        raise UserError(
            f"--scores {place}: holds no {result.FILE} with its {CACHE}; run python -m dpo.evaluate --output {place}"
        )
    with reading(str(path), "run python -m dpo.evaluate again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        try:
            measures = [_measure(entry) for entry in content["scorers"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no evaluation: {type(error).__name__}") from error
    found = []
    with ScoreCache(cache) as known:
        for measure in measures:
            numbers = [
                [known.get(hashed, measure.fingerprint, item.prompt) for hashed in item.hashes] for item in study.items
            ]
            values = np.array([[np.nan if one is None else one for one in both] for both in numbers])  # [items, 2]
            if np.isfinite(values).all(1).any():  # scores of sets and of tables are not in it
                found.append(_preferences(study, measure, values))
    if not found:
        raise UserError(f"--scores {place}: it scored none of the study's images")
    return found


def _measure(entry: Mapping[str, Any]) -> result.Measure:
    return result.Measure(
        str(entry["name"]),
        str(entry["fingerprint"]),
        higher_is_better=bool(entry.get("higher_is_better", True)),
        resolution=float(entry.get("resolution", 0.0)),
    )


def _of_table(study: Study, folder: Path, name: str, table: Path) -> Judged:
    """A scorer whose numbers another program wrote, by file or by hash."""
    files = {
        folder / path: (item.prompt, hashed)
        for item in study.items
        for path, hashed in zip(item.images, item.hashes, strict=True)
    }
    side = Side("the study", folder, tuple(Shown(path, prompt) for path, (prompt, _) in files.items()))
    look = scoring.Look(hashes={path: hashed for path, (_, hashed) in files.items()})
    numbers = dict(zip(files, scoring.table_scores((side,), table, look)[side.name].tolist(), strict=True))
    values = np.array([[numbers[folder / path] for path in item.images] for item in study.items])
    return _preferences(study, result.Measure(name, ""), values)


def _preferences(study: Study, measure: result.Measure, values: np.ndarray) -> Judged:
    gap = (values[:, 1] - values[:, 0]) * (1 if measure.higher_is_better else -1)
    tied = np.where(np.abs(gap) <= measure.resolution, 0.0, np.sign(gap))
    order = np.array([1.0 if item.sides[1] > item.sides[0] else -1.0 for item in study.items])
    return Judged(measure.name, tied * order)


def agreement(
    study: Study, answers: Sequence[Answer], question: str, scorers: Sequence[Judged], without: Container[str] = ()
) -> list[dict[str, Any]]:
    """How often each scorer prefers what people prefer, best first.

    {scorer, majority, interval, prompts, items, left_out, votes, behind, level}: the share of items where it prefers what
    the majority of raters does, its 95 % interval over prompts, on so many prompts and items; items left out because the
    scorer, or people, had no preference or it no score; the share of single votes (ties left out) that it agrees with;
    by how much it is behind the first, with interval; level: whether it may be as good as the first.
    """
    votes = tally.votes(study, answers, question, without=without)
    items, item = np.unique(votes.item, return_inverse=True)
    people = np.sign(np.bincount(item, votes.value))
    prompt = votes.prompt[np.unique(votes.item, return_index=True)[1]]
    entries: list[tuple[dict[str, Any], np.ndarray]] = []
    for one in scorers:
        said = one.later[items]
        usable = np.isfinite(said) & (said != 0) & (people != 0)
        hits = np.where(usable, said * people, np.nan)  # [items] 1 and -1
        by_prompt = _over_prompts(hits, prompt)
        known = by_prompt[np.isfinite(by_prompt)]
        decided = np.isfinite(said[item]) & (said[item] != 0) & (votes.value != 0)
        if not len(known):
            continue
        entry = {
            "scorer": one.scorer,
            "majority": float((1 + known.mean()) / 2),
            "interval": win_interval(known, int(usable.sum()), seed=SEED),
            "prompts": len(known),
            "items": int(usable.sum()),
            "left_out": int((~usable).sum()),
            "votes": float((said[item] == votes.value)[decided].mean()),
        }
        entries.append((entry, by_prompt))
    entries.sort(key=lambda pair: (-pair[0]["majority"], pair[0]["scorer"]))
    for entry, by_prompt in entries:
        gap = (entries[0][1] - by_prompt) / 2
        between = mean_interval(gap[np.isfinite(gap)], seed=SEED)
        entry["behind"] = None if entry is entries[0][0] else between
        entry["level"] = between is None or between[0] <= 0
    return [entry for entry, _ in entries]


def _over_prompts(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Means [P] of the values [items] that are there; nan for a prompt without any."""
    _, place = np.unique(prompt, return_inverse=True)
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.bincount(place[there], values[there], minlength=place.max() + 1 if len(place) else 0) / np.bincount(
            place[there], minlength=place.max() + 1 if len(place) else 0
        )

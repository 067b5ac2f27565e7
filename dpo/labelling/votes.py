"""What all scorers say of all images, one scorer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpo.common.console import Progress
from dpo.common.errors import UserError
from dpo.labelling.asked import Asked
from dpo.labelling.items import Items, content
from dpo.labelling.scores import of_table, scored, unreadable
from dpo.sampling.work import device_of
from dpo.scorers.cache import ScoreCache
from dpo.scorers.scorer import Scorer, listed, opened, temperature_of
from dpo.scorers.sets import SetScorer

LINES = 8  # of progress for a scorer, where there is no terminal


@dataclass(frozen=True)
class Votes:
    """What each scorer gave M images, and what is known of the scorers."""

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    weights: tuple[float, ...]
    signs: tuple[float, ...]
    scores: tuple[np.ndarray, ...]  # [M] float64 each
    temperature: float | None  # that of the scorer, where there is one and it has one
    resolution: float  # differences that the scorer, where there is one, cannot tell apart


def voted(asked: Asked, items: Items, cache: ScoreCache, places: range) -> Votes:
    """The scores of all scorers at `places`, nan elsewhere. One scorer is in memory at a time."""
    device = device_of(asked.device)
    alone = len(asked.scorers) + len(asked.tables) == 1
    names, prints, signs, scores = [], [], [], []
    own, resolution = None, 0.0
    for name, _ in asked.scorers:
        dtype = torch.bfloat16 if asked.half else torch.float32
        scorer: Scorer | SetScorer = opened(name, device=device, dtype=dtype, cache_dir=asked.cache_dir)
        if isinstance(scorer, SetScorer):
            raise UserError(
                f"--scorers {name} is of a whole set, so it cannot say which image is better: name one of images"
            )
        about = listed(name)
        if alone:
            own, resolution = temperature_of(scorer), about.resolution if about else 0.0
            _check_temperature(asked, scorer.name, own)
        scores.append(_told(items, scorer, cache, places))
        names.append(scorer.name)
        prints.append(scorer.fingerprint)
        signs.append(-1.0 if about is not None and not about.higher_is_better else 1.0)
        del scorer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, path, _ in asked.tables:
        if alone:
            _check_temperature(asked, name, None)
        scores.append(of_table(items, name, path))
        names.append(name)
        prints.append(f"table {content(path.read_bytes())}")
        signs.append(1.0)
    if not asked.scorers:  # nobody has looked at the images
        scores[0] = np.where(unreadable(items), np.nan, scores[0])
    weights = (*(weight for _, weight in asked.scorers), *(weight for _, _, weight in asked.tables))
    return Votes(tuple(names), tuple(prints), weights, tuple(signs), tuple(scores), own, resolution)


def _told(items: Items, scorer: Scorer, cache: ScoreCache, places: range) -> np.ndarray:
    """`scored`, with lines that say how far it is."""
    with Progress(len(places), lambda _: [scorer.name], 0, max(1, len(places) // LINES), unit="image") as bar:
        return scored(items, scorer, cache, lambda done, of: bar.update(done, {}), places)


def _check_temperature(asked: Asked, name: str, own: float | None) -> None:
    """Raises UserError, before anything is scored, where soft labels would have no temperature."""
    if asked.labels == "soft" and asked.temperature is None and asked.fit is None and own is None:
        raise UserError(
            f"{name} has no temperature of its own, so its differences are no probabilities: give --temperature, "
            "--fit-temperature with labelled pairs, or --labels hard"
        )

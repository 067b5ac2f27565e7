"""From what a user asks for to a folder of labelled pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dpo.common import locks
from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.data import labelled
from dpo.data.pairs import check_pairs
from dpo.data.parquet import read_in_order
from dpo.data.sources import check_output, describe, open_source
from dpo.data.store.store import of_store
from dpo.evaluating.asked import check_undrawn, drawn_alike, look_at
from dpo.evaluating.work import check_folders, side_of
from dpo.labelling import folder as place
from dpo.labelling.asked import Asked
from dpo.labelling.folder import CACHE
from dpo.labelling.items import Items, OfPairs, OfSides
from dpo.labelling.scale import halves
from dpo.labelling.votes import voted
from dpo.labelling.written import write
from dpo.sampling.work import FINISHING
from dpo.scorers.cache import ScoreCache
from dpo.settings.config import Data

log = logging.getLogger("dpo")


def label(asked: Asked, folder: Path, shard: tuple[int, int] = (0, 1), merge: Sequence[Path] = ()) -> bool:
    """Labels into `folder`; False where other processes still have to do their part.

    shard: this process of so many, each of which scores its part of the images; the last one to end writes. merge: folders
    of such parts, made without a common disk, whose scores are taken first. The same command goes on after a kill, and ends
    in the same bytes. Raises UserError.
    """
    for data in filter(None, (asked.pairs, asked.fit)):
        check_output(data, folder)
    part = "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"
    with ExitStack() as stack:
        stack.enter_context(locks.held(folder, "--output", part))
        with locks.held(folder, "--output", "-begin", FINISHING):  # of processes that start together
            there = place.begin(asked, folder)
        cache = stack.enter_context(ScoreCache(folder / CACHE))
        for other in merge:
            count = cache.take(other / CACHE)
            log.info("%s: %s of %s", folder, number_of(count, "scores"), other)
        items = _items(asked, folder, shard)
        fit = None if asked.fit is None else _to_fit(asked, items)
        made_of = {"source": items.fingerprint}
        if fit is not None and fit is not items:
            made_of["fit"] = fit.fingerprint
        with locks.held(folder, "--output", "-begin", FINISHING):
            there = place.check_source(asked, folder, made_of) and there
        if there:
            place.check_scorers(asked, folder)
            log.info("%s: the labels are there already", folder)
            return True
        if fit is not None:  # too few labels are found before anything is scored
            halves(np.isfinite(fit.source.prob), fit.source.caption_keys())
        places = range(len(items) * shard[0] // shard[1], len(items) * (shard[0] + 1) // shard[1])
        votes = voted(asked, items, cache, places)
        others = None if fit is None or fit is items else voted(asked, fit, cache, range(len(fit)))
        if not place.all_scored(folder, shard):
            return False
        if shard[1] > 1:
            votes = voted(asked, items, cache, range(len(items)))
        with locks.held(folder, "--output", "-writing", FINISHING):
            if (labelled.read(folder) or {}).get("finished"):
                return True
            write(asked, folder, items, votes, fit, others)
    return True


def _items(asked: Asked, folder: Path, shard: tuple[int, int]) -> Items:
    if asked.pairs is not None:
        return _of_pairs(asked.pairs)
    assert asked.draw is not None, "models need a protocol"
    check_folders([one.name for one in asked.models])
    drawn = look_at(asked.models, asked.draw, asked.captions)
    if not drawn:
        check_undrawn(asked.draw)
    if len(drawn) == len(asked.models) == asked.draw.seeds == 1:
        raise UserError(
            "one model with --seeds 1 draws one image of a prompt, and a pair has two: give --seeds 2 or more"
        )
    draw = drawn_alike(asked.models, asked.draw)
    sides = [side_of(one, draw, folder, asked.captions, shard) for one in asked.models]
    return OfSides(sides)


def _of_pairs(data: Data) -> OfPairs:
    source = open_source(data)
    if of_store(source) is not None:
        raise UserError(
            f"--data {data.data} is a prepared store, which keeps no image files: give the pairs it was made from"
        )
    check_pairs(source, str(data.data), "labels are of pairs: its own are read by python -m dpo.train --method kto")
    log.info("%s: %s", data.data, describe(source))
    return OfPairs(read_in_order(source))


def _to_fit(asked: Asked, items: Items) -> OfPairs:
    """The labelled pairs that the temperature is fitted on."""
    assert asked.fit is not None
    if isinstance(items, OfPairs) and asked.pairs is not None and asked.fit == asked.pairs:
        return items
    return _of_pairs(asked.fit)

"""Which training pairs are held out for the held-out accuracy, where no other set is named for that."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np

from dpo.common.errors import UserError
from dpo.data.order import keyed_numbers, keyed_share, share_up_to
from dpo.data.pairs import Source, Subset, caption_key, one_image, things
from dpo.data.store.store import of_store
from dpo.settings.config import Data

SHARE = 0.1  # of one's own pairs, where nothing was said
FEWEST = 50  # pairs: an accuracy of one half is then known to +-0.14
LARGEST_SHARE = 1 / 3
NEAR = 0.8  # of the wanted number: so few are enough where one caption more would be too many
FAR = 0.2  # of the wanted number: a split that is off by more is said
ENOUGH = 150  # pairs; with fewer none are held out unless it was asked for
WAYS = {"auto": ("caption", "pair")}  # the ways that are tried for --validation-by, one after another

log = logging.getLogger("dpo")


def decide(data: Data, train: Source) -> Data:
    """`data` with the share to hold out, and what is held out together, where the user left the share open.

    A tenth of the pairs that are no ties, at least FEWEST, at most LARGEST_SHARE and at most the validation_pairs that
    are measured; none of fewer than ENOUGH. Whole captions where they give that number or, below it, NEAR of it, else pairs.
    The share becomes the one that `split` answers with just these pairs, so that a resumed run, which reads it, has the
    same ones.
    """
    if data.validation_fraction is not None:
        return data
    sure = train.prob != 0.5
    count = int(sure.sum())
    if data.validation_data is not None or count < ENOUGH:
        if data.validation_data is None:
            log.info("held out: none of %d %s; below %d it takes --validation-fraction", count, things(train), ENOUGH)
        return replace(data, validation_fraction=0.0)
    wanted = min(max(FEWEST, math.ceil(SHARE * count)), data.validation_pairs)
    ways = WAYS.get(data.validation_by, (data.validation_by,))
    for way in ways:
        share, fits = _reaching(keyed_numbers(_keys(train, way)), sure, wanted)
        if fits:
            break
    return replace(data, validation_fraction=min(share, 0.5), validation_by=way)


def _reaching(numbers: np.ndarray, sure: np.ndarray, wanted: int) -> tuple[float, bool]:
    """The smallest share that holds out `wanted` of the pairs that are `sure`, and whether that is not too much.

    Where it is, the largest share that holds out fewer, if those are NEAR as many. numbers [n]: the pairs'
    `order.keyed_numbers`.
    """
    order = np.argsort(numbers, kind="stable")
    numbers, held = numbers[order], np.cumsum(sure[order])
    ends = np.flatnonzero(np.append(numbers[1:] != numbers[:-1], True))  # the last pair of each key
    reached = int(np.searchsorted(held[ends], wanted))
    for end in ends[reached::-1]:
        share = share_up_to(numbers[end])
        if held[end] < NEAR * wanted:
            break
        if held[end] <= LARGEST_SHARE * held[-1] and share <= 0.5:
            return share, True
    return share_up_to(numbers[ends[reached]]), False


def split(data: Data, train: Source) -> tuple[Source, Source | None]:
    """(the pairs left to train on, those held out without ties; None where the share is 0).

    The choice depends on the captions alone, or on the pairs' places in the set, whatever the seed. Raises UserError
    when a side is left without pairs.
    """
    share = data.validation_fraction
    if not share:
        return train, None
    for way in WAYS.get(data.validation_by, (data.validation_by,)):
        out = keyed_share(_keys(train, way), share)
        if out.any() and not out.all():
            log.info(
                "held out: %d of %d %s (%.0f %%), %s",
                out.sum(),
                len(out),
                things(train),
                100 * out.mean(),
                _told(train, way),
            )
            _say_nearer(keyed_numbers(_keys(train, way)), share, int(out.sum()))
            return Subset(train, np.flatnonzero(~out)), Subset(train, np.flatnonzero(out & (train.prob != 0.5)))
    side = "training" if out.all() else "validation"
    raise UserError(
        f"{data.data}: --validation-fraction {share:g} of {len(out)} {things(train)} leaves none for {side}"
    )


def check_apart(data: Data, train: Source, out: Source) -> None:
    """Raises UserError where every pair of data.validation_data in `out` is a training pair too, unless it was asked for.

    It was where data.validation_split is that of the training pairs. They are compared with the training pairs of their
    captions, so of another set the first pair mostly ends it; a key alone does not tell, for it may be of names that
    other files have too. Not looked through: sets too large to be kept in memory, and stores, which keep no images.
    """
    asked = data.validation_split == data.split != Data.validation_split
    if asked or train.window is not None or of_store(train) is not None or train.sides != out.sides:
        return
    captions, known = train.caption_keys(), dict[int, dict[int, int]]()

    def trained(place: int, caption: int) -> bool:
        if caption not in known:
            known[caption] = {train[int(i)].key: int(i) for i in np.flatnonzero(captions == caption)}
        pair = out[place]
        same = known[caption].get(pair.key)
        return same is not None and all(map(one_image, train[same].images, pair.images))

    if all(trained(place, caption) for place, caption in enumerate(out.caption_keys().tolist())):
        raise UserError(
            f"{data.validation_data}: all {len(out)} held-out {things(out)} are training {things(out)} too: name others with "
            "--validation-data, or leave it out: then some of --data are held out"
        )


def _say_nearer(numbers: np.ndarray, share: float, held: int) -> None:
    """Warns where keys of many pairs hold out far more or fewer than `share` of them, and names a share that comes nearer.

    The share itself stays what was asked for: a run that is resumed, and one that is made again, split alike.
    """
    order = np.sort(numbers)
    ends = np.flatnonzero(np.append(order[1:] != order[:-1], True))
    wanted = share * len(order)
    nearest = int(ends[np.abs(ends[:-1] + 1 - wanted).argmin()]) + 1 if len(ends) > 1 else held
    if abs(held - wanted) > FAR * wanted and abs(nearest - wanted) < abs(held - wanted):
        between = float(order[nearest - 1]) / 2**32, float(order[nearest]) / 2**32
        better = next(b for digits in range(2, 9) if between[0] < (b := round(sum(between) / 2, digits)) < between[1])
        log.warning(
            "--validation-fraction %g is a share of captions, which have unequal numbers of pairs: %g holds out %d of them",
            share, better, nearest,
        )  # fmt: skip


def _keys(train: Source, way: str) -> np.ndarray:
    """What pairs are held out by, [n] int64: equal keys stay together."""
    return train.caption_keys() if way == "caption" else np.arange(len(train), dtype=np.int64)


def _told(train: Source, way: str) -> str:
    """In words how pairs were held out."""
    if way == "caption":
        return "by caption: none is on both sides"
    captions, each = np.unique(train.caption_keys()), f"each {things(train)[:-1]} alone"
    if len(captions) == len(train):
        return each
    if len(captions) > 1:
        return f"{each}, so that a caption may be on both sides, and an image too"
    why = "they have no captions" if captions[0] == caption_key("") else "they have one caption"
    return f"{each}: {why}; an image may be on both sides"

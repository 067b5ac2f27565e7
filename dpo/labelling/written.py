"""Pairs of scored images: labelled, and written shard by shard with where their labels come from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.console import Progress
from dpo.common.errors import UserError
from dpo.common.files import make_folder, sweep
from dpo.common.words import digest, number_of
from dpo.data import labelled
from dpo.data.pairs import BadImage, caption_key
from dpo.data.writing import Judged, Layout, write_pairs
from dpo.labelling import scale, summary
from dpo.labelling.asked import Asked
from dpo.labelling.folder import README, files, forget_parts
from dpo.labelling.items import Item, Items, OfPairs, OfSides, content
from dpo.labelling.votes import Votes
from dpo.pairing.choose import paired

log = logging.getLogger("dpo")

MADE = b"dpo.label"  # in a parquet file's metadata: the hash of the protocol that it was made by


class Pairs(NamedTuple):
    """n pairs as they are written; images by their place among the items."""

    first: np.ndarray  # [n] int64
    second: np.ndarray  # [n] int64
    captions: np.ndarray  # [n] int64 keys
    old: np.ndarray  # [n] float64 in [0, 1]: probability that the first is preferred; nan where nobody said


def write(asked: Asked, folder: Path, items: Items, votes: Votes, fit: OfPairs | None, others: Votes | None) -> None:
    """Pairs, labels, files and pages of images that all have their scores."""
    voters = scale.voters(votes.names, votes.weights, votes.signs, votes.scores)
    total = scale.combined(voters, votes.scores)
    pairs = _paired(asked, items, total)
    apart = total[pairs.first] - total[pairs.second]
    fitting = None
    if fit is not None:
        own = votes.temperature or 1.0
        known = pairs if others is None else _of_rows(fit)
        judged = total if others is None else scale.combined(voters, others.scores)
        fitting = scale.fitted(judged[known.first] - judged[known.second], known.old, known.captions, own)
    temperature = None
    if asked.labels == "soft":
        temperature = fitting.temperature if fitting else asked.temperature or votes.temperature or 1.0
    margin = votes.resolution if asked.margin is None else asked.margin
    label_0 = scale.labels(apart, margin)
    kept = np.flatnonzero(np.isfinite(label_0))
    if not len(kept):
        raise UserError("no pair can be labelled: none has a score for both of its images")
    p = label_0 if temperature is None else scale.probabilities(apart, temperature)
    protocol = {
        **asked.said(),
        "source": items.fingerprint,
        "scorers": [
            {**one._asdict(), "asked": name, "fingerprint": seen}
            for one, name, seen in zip(voters, _asked_as(asked), votes.fingerprints, strict=True)
        ],
        "temperature": temperature,
        "margin": margin,
    }
    mark = digest(json.dumps(protocol, sort_keys=True))
    names = files(len(kept), asked.rows_per_file)
    data = folder / labelled.FOLDER
    make_folder(data, "--output")
    sweep(data)
    examples = dict(zip(*(part.tolist() for part in np.unique(pairs.captions[kept], return_counts=True)), strict=True))
    lines = _Lines(items, votes, total, pairs, label_0, p, mark, examples, asked.layout)
    with Progress(len(kept), lambda figures: ["written"], 0, asked.rows_per_file, unit="pair") as bar:
        for number, name in enumerate(names):
            begin = number * asked.rows_per_file
            rows = kept[begin : begin + asked.rows_per_file]
            if not _is_made(data / name, mark, len(rows)):
                write_pairs(data / name, lines.judged(rows), asked.layout, begin=begin, about={MADE.decode(): mark})
            bar.update(begin + len(rows), {})
    content = {
        "protocol": mark,
        "made_by": protocol,
        "pairs": len(kept),
        "files": names,
    }
    told = summary.Made(
        scorers=protocol["scorers"],
        rows=len(apart),
        apart=apart,
        label_0=label_0,
        p=p,
        old=pairs.old,
        captions=pairs.captions,
        temperature=temperature,
        own_temperature=votes.temperature,
        margin=margin,
        fitting=None if fitting is None else fitting._asdict(),
        item=lambda row, side: items[int((pairs.first, pairs.second)[side][row])],
    )
    sweep(folder, README)
    summary.write(folder, told)
    summary.write_readme(folder / README, told, asked.layout)
    forget_parts(folder)
    labelled.write(folder, {**(labelled.read(folder) or {}), **content, "finished": True})
    for line in summary.lines(told):
        log.info("%s", line)
    written = f"{number_of(len(kept), 'pairs')} in {number_of(len(names), 'files')}"
    log.info("%s: %s; train with --data %s", folder, written, folder)


def _asked_as(asked: Asked) -> list[str]:
    return [name for name, _ in asked.scorers] + [name for name, _, _ in asked.tables]


def _paired(asked: Asked, items: Items, total: np.ndarray) -> Pairs:
    if isinstance(items, OfPairs):
        return _of_rows(items)
    assert isinstance(items, OfSides)
    prompts, prompt = items.prompts()
    names: dict[int, str] = {}

    def uid(place: int) -> str:
        if place not in names:
            names[place] = content(_bytes(items, place))
        return names[place]

    found = paired(
        prompts, prompt, total, uid, pairing=asked.pairing, per_prompt=asked.per_prompt, min_margin=asked.min_margin,
        seed=asked.seed,
    )  # fmt: skip
    if not found:
        raise UserError(
            f"no prompt of {len(prompts)} has two different images with scores"
            + (f" that differ by --min-margin {asked.min_margin:g}: lower it, or" if asked.min_margin else ":")
            + " draw more --seeds"
        )
    first, second = np.array(found, dtype=np.int64).T
    keys = np.array([caption_key(text) for text in prompts], dtype=np.int64)[prompt[first]]
    return Pairs(first, second, keys, np.full(len(first), np.nan))


def _of_rows(items: OfPairs) -> Pairs:
    rows = np.arange(len(items.source), dtype=np.int64)
    return Pairs(2 * rows, 2 * rows + 1, items.source.caption_keys(), np.round(items.source.prob.astype(np.float64), 6))


def _bytes(items: Items, place: int) -> bytes:
    try:
        return items[place].image.load()
    except BadImage as error:
        raise UserError(
            f"{error}: the image could be read when it was scored; put it back, then start the same command again"
        ) from error


def _is_made(path: Path, mark: str, rows: int) -> bool:
    """Whether a file is whole and of this protocol: it was put in place in one step."""
    try:
        found = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return found.num_rows == rows and (found.metadata or {}).get(MADE) == mark.encode()


@dataclass(frozen=True)
class _Lines:
    """The rows of the files."""

    items: Items
    votes: Votes
    total: np.ndarray  # [M]
    pairs: Pairs
    label_0: np.ndarray  # [n]
    p: np.ndarray  # [n]
    mark: str
    examples: Mapping[int, int]  # pairs of each caption, by its key
    layout: Layout

    def judged(self, rows: np.ndarray) -> Iterator[Judged]:
        for row in rows.tolist():
            places = int(self.pairs.first[row]), int(self.pairs.second[row])
            first, second = (self.items[place] for place in places)
            data = [_bytes(self.items, place) for place in places]
            uids = [_uid(item, file) for item, file in zip((first, second), data, strict=True)]
            yield Judged(
                caption=first.caption,
                first=data[0],
                second=data[1],
                uid_0=uids[0],
                uid_1=uids[1],
                label_0=float(self.label_0[row]),
                p=float(self.p[row]),
                model_0=first.model,
                model_1=second.model,
                extra=self._extra(row, places),
                examples=self.examples[int(self.pairs.captions[row])],
            )

    def _extra(self, row: int, places: tuple[int, int]) -> dict[str, float | str | None]:
        """The columns of provenance; those of an image are named as the layout names the image."""
        votes, old = self.votes, float(self.pairs.old[row])
        ends = ("0", "1")
        if self.layout == "chosen-rejected":
            ends = ("chosen", "rejected")
            if self.label_0[row] < 0.5:  # the images change places, and what is said of them too
                places, old = (places[1], places[0]), 1.0 - old
        found: dict[str, float | str | None] = {
            "scorer": " + ".join(votes.names),
            "scorer_fingerprint": " + ".join(votes.fingerprints),
        }
        for end, place in zip(ends, places, strict=True):
            found[f"score_{end}"] = float(votes.scores[0][place] if len(votes.names) == 1 else self.total[place])
        if len(votes.names) > 1:
            for name, scores in zip(votes.names, votes.scores, strict=True):
                found |= {f"score_{end}_{name}": float(scores[place]) for end, place in zip(ends, places, strict=True)}
        if np.isfinite(self.pairs.old).any():
            found[f"old_label_{ends[0]}"] = old
        return found | {"protocol": self.mark}


def _uid(item: Item, data: bytes) -> str:
    """The set's own name of an image, else a hash of its file: a drawn image's file name is no name of it."""
    return content(data) if item.model else item.image.uid

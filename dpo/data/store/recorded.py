"""Recorded reference errors: two floats for each (pair, draw), so that training holds no reference model.

A record belongs to a store and lies in its folder `reference/`. It was made with one reference, schedule, seed, set of
timesteps and precision; a run that differs in any of these is refused, except that its timestep window may be narrower.
Then it uses the recorded draws whose timestep lies inside the window. In epoch e a pair has draw e mod (number of
draws). With a window, of the m draws of a pair that lie inside, it has number e mod m; a pair without such a draw is
left out.

    reference/<name>/record.json              what it was made with, and its pieces
    reference/<name>/<piece>.safetensors      errors [draws, pairs, 2] fp32 of a stretch of pairs and of draws
    reference/<name>/<piece>/                 blocks of a piece that is being recorded
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csrc_triton.philox import Stream, integers
from dpo.common.errors import UserError
from dpo.common.words import digest, number_of
from dpo.data.pairs import Source, Subset
from dpo.data.store.files import DamagedStore, check_shard, open_shard, read_sealed
from dpo.data.store.store import Contents, of_store
from dpo.schedule import Plan
from dpo.settings.config import Data, Runtime

log = logging.getLogger("dpo")

FOLDER = "reference"
FLAGS = {
    "flip": "--flip",
    "caption_dropout": "--caption-dropout",
    "dropped_caption": "--dropped-caption",
    "seed": "--seed",
    "precision": "--precision",
    "timestep_draw": "--timestep-draw",
    "train_guidance": "--train-guidance",
}
UNNAMED = {"dropped_caption": "empty", "timestep_draw": "grid"}  # what an identity without this name means
NONE_YET = "there is none yet"
NO_STORE = "--reference recorded needs a prepared store as --data, with a record: python -m dpo.prepare --reference"
OF_SHAPES = "schedule_of_shapes"  # the levels of buckets, which earlier versions did not name: their "schedule" decides


def identity(
    data: Data, runtime: Runtime, plan: Plan, reference: str, beside: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What recorded errors depend on, besides the timesteps; reference: the fingerprint of the reference's weights.

    beside: what they depend on of a model of flow matching alone.
    """
    return {
        "reference": reference,
        "prediction_type": plan.prediction_type,
        "schedule": digest(plan.content().numpy().tobytes().hex()),
        **asked(data, runtime),
        **beside,
    }


def asked(data: Data, runtime: Runtime) -> dict[str, Any]:
    """The part of `identity` that needs no model; what the settings leave open is in it as they have it."""
    zeros = data.caption_dropout > 0 and data.dropped_caption == "zeros"
    return {
        "seed": runtime.seed,
        "precision": runtime.precision,
        "flip": data.flip,
        "caption_dropout": data.caption_dropout,
        **({"dropped_caption": "zeros"} if zeros else {}),
    }


@dataclass(frozen=True)
class Piece:
    """A stretch of a record: pairs begin..end-1 of the store in draws first..last-1."""

    begin: int
    end: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"pairs-{self.begin:09d}-{self.end:09d}-draws-{self.first:03d}-{self.last:03d}"


@dataclass(frozen=True)
class RecordedErrors:
    """A record that suits a run."""

    pieces: tuple[tuple[Piece, Tensor], ...]  # with the errors of each piece [draws, pairs, 2] fp32
    distinct: int  # draws that every pair has
    seed: int
    timesteps: Tensor  # [K] int64, the timesteps that the record drew from
    inside: Tensor | None  # [K] bool: those in the run's window; None where all are

    def draws(self, keys: Tensor, epochs: Tensor) -> Tensor:
        """The draw [B] int64 of each pair, by its key [B] and its epoch [B]."""
        if self.inside is None:
            return epochs % self.distinct
        order, count = self._in_window(keys)
        return order.gather(1, (epochs % count.clamp_min(1))[:, None])[:, 0]

    def _in_window(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The draws of each pair [B, distinct], those inside the window first and in order; how many are inside [B]."""
        assert self.inside is not None
        every = torch.arange(self.distinct).repeat(len(keys))
        repeated = keys.repeat_interleave(self.distinct)
        drawn = integers(repeated, every, Stream.TIMESTEP, self.seed, 0, len(self.timesteps))
        inside = self.inside[drawn].view(len(keys), self.distinct)
        return torch.argsort(~inside, dim=1, stable=True), inside.sum(1)

    def errors(self, pairs: np.ndarray, draws: Tensor) -> Tensor:
        """Errors [2, B] fp32 of win and lose, for pairs [B] int64 (numbers in the store) in draws [B]; else nan."""
        rows = torch.from_numpy(pairs)
        found = torch.full((2, len(rows)), torch.nan)
        for piece, errors in self.pieces:
            here = (rows >= piece.begin) & (rows < piece.end) & (draws >= piece.first) & (draws < piece.last)
            found[:, here] = errors[draws[here] - piece.first, rows[here] - piece.begin].T
        return found

    def covered(self, source: Source) -> Source:
        """The pairs of a store's source that have a draw inside the window. Raises UserError when there are none."""
        store = of_store(source)
        assert store is not None
        if self.inside is None:
            log.info("recorded reference: %d distinct draws of each pair", self.distinct)
            return source
        counts = torch.cat(
            [self._in_window(torch.from_numpy(part))[1] for part in _chunks(store.contents.key[store.pairs])]
        )
        kept = np.flatnonzero(counts.numpy() > 0)
        if not len(kept):
            raise UserError("no recorded draw lies in the timestep window: record more --draws, or inside the window")
        log.info(
            "recorded reference: %.2f distinct draws of a pair in the timestep window, of %d; %d of %d pairs have one",
            float(counts.float().mean()), self.distinct, len(kept), len(counts),
        )  # fmt: skip
        return source if len(kept) == len(counts) else Subset(source, kept)


def _chunks(keys: np.ndarray, size: int = 1 << 16) -> Iterator[np.ndarray]:
    return (keys[begin : begin + size] for begin in range(0, len(keys), size))


def find(source: Source, wanted: Mapping[str, Any], timesteps: Tensor, checksum: str | None = None) -> RecordedErrors:
    """The record in the store of `source` that suits a run: its `identity` is `wanted`, and it has the run's timesteps.

    timesteps [K] int64: those that the run draws from; the record may have more. checksum: of all the reference's
    weights, where the record has it too (those of earlier versions do not). Raises UserError that names the
    difference when no record suits, or the record was made from other pairs than the store holds.
    """
    store = of_store(source)
    if store is None:
        raise UserError(NO_STORE)
    found: list[tuple[int, Path, dict[str, Any]]] = []
    reasons: list[tuple[int, int, str]] = []
    run = UNNAMED | dict(wanted)
    for folder, about in _records(store.contents.folder):
        named = {OF_SHAPES} & about["identity"].keys()
        differs = _unlike(about, run, {*run, "train_guidance"} - {OF_SHAPES} | named)  # the two are not of all models
        if not differs and not same_weights(about, checksum):
            differs = ["it was recorded with another reference"]
        missing = len(set(timesteps.tolist()) - set(about["timesteps"]))
        if differs or missing:
            lacks = [*differs, *([f"its timesteps lack {missing} of the run's"] if missing else [])]
            reasons.append((len(differs), missing, "; ".join(lacks)))
        else:
            found.append((len(about["timesteps"]), folder, about))
    if not found:
        why = min(reasons)[2] if reasons else NONE_YET
        raise UserError(
            f"no recorded reference in {store.contents.folder} suits this run ({why}): make one with dpo.prepare --reference"
        )
    return _open(*min(found, key=lambda item: item[0])[1:], store.contents, timesteps)


def lacking(folder: Path, known: Mapping[str, Any]) -> str:
    """Why no record in the store in `folder` can suit a run, in words; empty where one may.

    known: what is known of the run's `identity` before its model is loaded, which `find` asks for all of.
    """
    reasons = [_unlike(about, known, known.keys()) for _, about in _records(folder)]
    return min((len(differs), "; ".join(differs)) for differs in reasons)[1] if reasons else NONE_YET


def _records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the content of each record of a store. Raises DamagedStore."""
    for record in sorted((folder / FOLDER).glob("*")):
        if (about := about_record(record)) is not None:
            yield record, about


def same_weights(about: Mapping[str, Any], checksum: str | None) -> bool:
    """Whether a record was made with the weights of this checksum, as far as both are known."""
    return checksum is None or about.get("reference_checksum") in (None, checksum)


def _unlike(about: Mapping[str, Any], run: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """How a record differs from a run in what these names of an `identity` say, in words."""
    was = UNNAMED | about["identity"]
    return list(filter(None, (_differs(name, was.get(name), run.get(name)) for name in sorted(names))))


def _differs(name: str, recorded: Any, wanted: Any) -> str:
    if recorded == wanted:
        return ""
    if name in FLAGS:
        return f"it was recorded with {FLAGS[name]} {recorded}, the run has {wanted}"
    return f"it was recorded with another {name.replace('_', ' ')}" + (
        f", {recorded}" if name == "prediction_type" else ""
    )


def again(folder: Path) -> str:
    """What to do about a damaged record: the store that it lies in is whole."""
    return f"delete {folder} and record it again with python -m dpo.prepare --reference"


def about_record(folder: Path) -> dict[str, Any] | None:
    """The content of record.json, None where there is none. Raises DamagedStore."""
    return read_sealed(folder / "record.json", again(folder))


def _open(folder: Path, about: Mapping[str, Any], contents: Contents, timesteps: Tensor) -> RecordedErrors:
    pieces = []
    for entry in about["pieces"]:
        if digest(*contents.sums[: entry["shards"]]) != entry["store"]:
            raise UserError(f"{folder} was recorded from other pairs than {contents.folder} holds now: record it again")
        check_shard(folder / entry["file"], entry, whole=True, remedy=again(folder))
        piece = Piece(*entry["piece"])
        errors = open_shard(folder / entry["file"], again(folder))["errors"].clone()  # a few bytes a pair: not mapped
        pieces.append((piece, errors))
    draws = bands([piece for piece, _ in pieces])
    if not draws or max(end for _, end in draws) < len(contents.key):
        missing = len(contents.key) - max((end for _, end in draws), default=0)
        raise UserError(
            f"{folder} lacks {number_of(missing, 'pairs')} of the store: run python -m dpo.prepare --reference again"
        )
    recorded = torch.tensor(about["timesteps"], dtype=torch.int64)
    inside = torch.isin(recorded, timesteps)
    distinct, seed = min(draws.values()), about["identity"]["seed"]
    return RecordedErrors(tuple(pieces), distinct, seed, recorded, None if bool(inside.all()) else inside)


def bands(pieces: list[Piece]) -> dict[tuple[int, int], int]:
    """(begin, end) of each stretch of pairs -> the number of draws recorded of it."""
    found: dict[tuple[int, int], int] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.begin, piece.first)):
        found[piece.begin, piece.end] = max(found.get((piece.begin, piece.end), 0), piece.last)
    return found


def unfinished(folder: Path, pairs: int) -> list[str]:
    """How to finish the records of a store of so many pairs, a line for each that is not finished."""
    lines = []
    for record in sorted((folder / FOLDER).glob("*")):
        about = about_record(record) or {"pieces": []}
        lacking = pairs - max((Piece(*entry["piece"]).end for entry in about["pieces"]), default=0)
        if lacking > 0 or any(path.is_dir() for path in record.iterdir()):
            lines.append(f"{record} is not finished: run the same python -m dpo.prepare --reference command again")
    return lines


def verify(folder: Path) -> list[str]:
    """What is wrong with the records of a store, a line for each file."""
    wrong = []
    for record in sorted((folder / FOLDER).glob("*")):
        try:
            about = about_record(record)
            for entry in about["pieces"] if about else []:
                check_shard(record / entry["file"], entry, whole=True, remedy=again(record))
        except DamagedStore as error:
            wrong.append(str(error))
    return wrong

"""A prepared store as a source of pairs: latents and encoded captions instead of images and text, in the same order.

A store is one folder of shards, or an index over such folders (parts). About 50 bytes a pair are kept in memory;
latents and encodings stay in the memory-mapped files, and each row is checked whenever it is read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import Mapped, checksum
from dpo.common.words import digest
from dpo.data.images import Size
from dpo.data.pairs import ImageRef, Pair, Source, Subset, smoothed
from dpo.data.store.files import (
    HIDDEN,
    INDEX,
    LATENTS,
    POOLED,
    PREPARE_AGAIN,
    SPAN,
    TEXT,
    UNNAMED,
    DamagedStore,
    Parts,
    check_shard,
    crc,
    open_shard,
    read_index,
    tables_crc,
    write_index,
)
from dpo.data.store.mended import in_order
from dpo.data.store.parts import check_alike, check_labels, check_place, counted, of_order
from dpo.settings.config import Data

OPEN_SHARDS = 4096  # memory maps kept open; they cost address space, not memory


class Rows(NamedTuple):
    """Where the rows of all shards are: the first row of each shard, and the number of all rows."""

    starts: np.ndarray  # [shards + 1] int64

    def find(self, row: int) -> tuple[int, int]:
        """(shard, row within it)."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])


@dataclass(frozen=True, eq=False)  # two are the same only as objects: their tensors are cached
class Contents:
    """All of a store but its latents and encodings.

    Rows of images and captions count through all shards; -1 is an image that cannot be used.
    """

    folder: Path
    settings: Mapping[str, Any]
    shards: tuple[Path, ...]
    sums: tuple[str, ...]  # SHA-256 of each shard
    pairs: Rows
    images: Rows
    captions: Rows
    order: np.ndarray  # [m] int64: the pairs in the order of the data, without the holes that others stand for
    key: np.ndarray  # [n] int64
    win: np.ndarray  # [n] int64, row of an image
    lose: np.ndarray  # [n] int64; of images without a partner the same row
    caption: np.ndarray  # [n] int64, row of a caption
    prob: np.ndarray  # [n] fp32, before smoothing
    group: np.ndarray | None  # [n] int32, where the pairs were read in groups
    window: int | None
    bucket: np.ndarray | None  # [n] int32, where the images have several shapes
    caption_hash: np.ndarray  # [captions] int64
    summary: Mapping[str, int]
    fingerprint: str

    @functools.lru_cache(OPEN_SHARDS)  # noqa: B019  (a run has one or two stores, and keeps them)
    def _opened(self, number: int) -> tuple[dict[str, Tensor], Mapped]:
        tensors = open_shard(self.shards[number])  # first: it has words for a file that is missing
        return tensors, Mapped([self.shards[number]])

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, as views on its file. Raises UserError when that was changed since it was opened."""
        tensors, mapped = self._opened(number)
        mapped.check()
        return tensors

    def latents(self, names: Sequence[str], rows: Sequence[int], size: Size | None = None) -> list[Tensor]:
        """A tensor [N, C, h, w] for each name, of the images at `rows` [N]; zero where the row is -1.

        names: of files.LATENTS; size: pixels of these images, None for the square. Raises DamagedStore when an image fails
        its checksum.
        """
        read = [None if row < 0 else self._read("image", row) for row in rows]
        empty = {name: self._like(name, size) for name in names} if None in read else {}
        return [torch.stack([empty[name] if one is None else one[name] for one in read]) for name in names]

    def encoded(self, rows: Sequence[int]) -> Parts:
        """The encoded captions at `rows` [N], by place, as they were before they were stored."""
        read = [self._read("caption", row) for row in rows]
        hidden = [row[HIDDEN] for row in read]
        pooled = torch.stack([row[POOLED] for row in read]) if POOLED in read[0] else None
        if SPAN not in self._first("caption"):
            return torch.stack(hidden), pooled, None
        padded = hidden[0].new_zeros(len(rows), self.settings["text_tokens"], hidden[0].shape[-1])
        mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
        for i, states in enumerate(hidden):
            padded[i, : len(states)], mask[i, : len(states)] = states, True
        return padded, pooled, mask

    def _read(self, kind: str, row: int) -> dict[str, Tensor]:
        """All that is stored of an image or a caption, by name. Raises DamagedStore when it fails its checksum."""
        number, at = (self.images if kind == "image" else self.captions).find(row)
        shard = self.shard(number)
        names = LATENTS if kind == "image" else TEXT
        found = {name: self._row(shard, name, at) for name in names if name in shard}
        if crc(*found.values()) != int(shard[f"{kind}_crc"][at]):
            raise DamagedStore(f"{self.shards[number]} was altered: {kind} {at} has another checksum; {PREPARE_AGAIN}")
        return found

    def _row(self, shard: Mapping[str, Tensor], name: str, at: int) -> Tensor:
        """One row of a tensor: latents of several shapes, and captions without their padding, lie one after another."""
        if name == HIDDEN and SPAN in shard:
            return shard[name][_between(shard[SPAN], at)]
        if name not in LATENTS or self.bucket is None:
            return shard[name][at]
        high, wide = (int(side) // self.settings["vae_scale"] for side in shard["image_micro"][at, 4:])
        return shard[name][_between(shard["image_end"], at)].view(-1, high, wide)

    def _first(self, kind: str) -> dict[str, Tensor]:
        """A shard that has rows of this kind."""
        starts = (self.images if kind == "image" else self.captions).starts
        return self.shard(int(np.flatnonzero(np.diff(starts))[0]))

    def _like(self, name: str, size: Size | None) -> Tensor:
        """An image of zeros."""
        row = self._row(self._first("image"), name, 0)
        scale = size and [side // self.settings["vae_scale"] for side in size]
        return torch.zeros(row.shape[:-2] + torch.Size(scale) if scale else row.shape, dtype=row.dtype)

    def text(self, row: int) -> str:
        """The caption at a row."""
        number, at = self.captions.find(row)
        shard = self.shard(number)
        return bytes(shard["caption_text"][_between(shard["caption_end"], at)].numpy()).decode("utf-8", "surrogatepass")

    def micro(self, rows: Sequence[int], size: Size | None = None) -> Tensor:
        """SDXL's size and crop [N, 6] int64 of images of `size` (None: the square); those of an uncut one where the row is -1."""
        size = size or (self.settings["resolution"],) * 2
        plain = torch.tensor([*size, 0, 0, *size])
        places = [self.images.find(row) if row >= 0 else None for row in rows]
        return torch.stack(
            [plain if place is None else self.shard(place[0])["image_micro"][place[1]].long() for place in places]
        )


def _between(ends: Tensor, at: int) -> slice:
    """Where row `at` lies, of rows that lie one after another and end at `ends` [N]."""
    return slice(int(ends[at - 1]) if at else 0, int(ends[at]))


@dataclass(frozen=True)
class StoreSource:
    """The pairs of a store that a run uses, in the order in which they were prepared."""

    contents: Contents
    pairs: np.ndarray  # [m] int64, their numbers in the store
    smoothing: float

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        """The pair, whose images have neither bytes nor a path."""
        inside, at = self.contents, int(self.pairs[index])
        win, lose = ImageRef(f"image {inside.win[at]}"), ImageRef(f"image {inside.lose[at]}")
        prob, caption = smoothed(float(inside.prob[at]), self.smoothing), inside.text(int(inside.caption[at]))
        return Pair(int(inside.key[at]), caption, win, lose if self.sides == 2 else None, prob)

    @property
    def prob(self) -> np.ndarray:
        return self.contents.prob[self.pairs]

    @property
    def sides(self) -> int:
        return int((UNNAMED | dict(self.contents.settings))["sides"])

    @property
    def groups(self) -> np.ndarray | None:
        return None if self.contents.group is None else self.contents.group[self.pairs]

    @property
    def window(self) -> int | None:
        return self.contents.window

    @property
    def summary(self) -> dict[str, int]:
        return dict(self.contents.summary) | {"pairs": len(self)}

    @property
    def fingerprint(self) -> str:
        return digest(self.contents.fingerprint, str(len(self)))

    def caption_keys(self) -> np.ndarray:
        return self.contents.caption_hash[self.contents.caption[self.pairs]]


def is_store(path: Path) -> bool:
    return (path / INDEX).is_file()


def of_store(source: Source) -> StoreSource | None:
    """`source` as pairs of a store, None when it is no store or subset of one."""
    if isinstance(source, StoreSource):
        return source
    if isinstance(source, Subset):
        inner = of_store(source.source)
        return inner and replace(inner, pairs=inner.pairs[source.indices])
    return None


def open_store(folder: Path, data: Data) -> StoreSource:
    """The pairs of a finished store that `data` asks for.

    Raises UserError when it is unfinished, damaged or unsuitable.
    """
    contents = read_contents(folder)
    _suit(contents, data)
    pairs = contents.order
    if data.ties == "drop":
        pairs = pairs[contents.prob[pairs] != 0.5]
    return StoreSource(contents, pairs[: data.max_pairs], data.label_smoothing)


def _suit(contents: Contents, data: Data) -> None:
    where, settings = contents.folder, contents.settings
    if data.crop == "random":
        raise UserError(f"{where} holds centre crops: --crop random needs the images themselves")
    if data.flip and not settings["flip"]:
        raise UserError(f"{where} has no mirrored images: leave out --flip, or prepare with --flip")
    if data.buckets != bool((UNNAMED | dict(settings))["buckets"]):
        have, change = ("squares", "prepare with --buckets") if data.buckets else ("buckets", "give --buckets")
        raise UserError(f"{where} holds {have}: {change}, or {'leave it out' if data.buckets else 'prepare without'}")
    if data.resolution not in (None, settings["resolution"]):
        raise UserError(
            f"{where} holds images of {settings['resolution']} pixels: --resolution {data.resolution} needs another store"
        )


def read_contents(folder: Path, index: Mapping[str, Any] | None = None) -> Contents:
    """Reads the tables of a finished store, and its index where `index` is not one that it will have.

    Raises UserError when it is unfinished or its parts differ in settings, DamagedStore when a file is missing or
    altered.
    """
    index = _finished(folder) if index is None else index
    parts = (
        [(folder, index)] if "parts" not in index else [(where, _finished(where)) for where in _parts(folder, index)]
    )
    check_alike(parts)
    entries = [(where / entry["file"], entry) for where, part in parts for entry in part["shards"]]
    bucketed = ("bucket",) if parts[0][1]["settings"].get("buckets") else ()
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("key", "win", "lose", "caption", "prob", "group", "hash", *bucketed)
    }
    image_base = caption_base = 0
    for where, part in parts:
        for entry in part["shards"]:
            shard = _tables(where / entry["file"], entry)
            for name in ("key", "prob", "group", *bucketed):
                columns[name].append(shard[f"pair_{name}"].numpy().copy())
            for name in ("win", "lose"):
                rows = shard[f"pair_{name}"].numpy()
                columns[name].append(np.where(rows < 0, rows, rows + image_base))
            columns["caption"].append(shard["pair_caption"].numpy() + caption_base)
            columns["hash"].append(shard["caption_key"].numpy().copy() if entry["captions"] else np.empty(0, np.int64))
        image_base += sum(entry["images"] for entry in part["shards"])
        caption_base += sum(entry["captions"] for entry in part["shards"])
    table = {name: np.concatenate(values) for name, values in columns.items()}
    group, window = of_order(parts, table["group"])
    order = in_order([part["shards"] for _, part in parts])
    return Contents(
        folder=folder,
        settings=parts[0][1]["settings"],
        shards=tuple(path for path, _ in entries),
        sums=tuple(entry["sha256"] for _, entry in entries),
        pairs=_starts([entry["pairs"] for _, entry in entries]),
        images=_starts([entry["images"] for _, entry in entries]),
        captions=_starts([entry["captions"] for _, entry in entries]),
        order=order,
        key=table["key"],
        win=table["win"],
        lose=table["lose"],
        caption=table["caption"],
        prob=table["prob"],
        group=group,
        window=window,
        bucket=table.get("bucket"),
        caption_hash=table["hash"],
        summary=counted(parts, table["win"][order], table["lose"][order]),
        fingerprint=digest(*(entry["sha256"] for _, entry in entries)),
    )


def _starts(counts: list[int]) -> Rows:
    return Rows(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _tables(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    check_shard(path, entry)
    shard = open_shard(path)
    if tables_crc(shard) != entry["crc"]:
        raise DamagedStore(f"{path} was altered: its tables have another checksum; {PREPARE_AGAIN}")
    return shard


def _finished(folder: Path) -> dict[str, Any]:
    index = read_index(folder)
    if index is None:
        raise UserError(f"{folder} is no prepared store ({INDEX} is missing): make one with python -m dpo.prepare")
    if not index.get("finished"):
        raise UserError(f"{folder} is not finished: run the same python -m dpo.prepare command again")
    return index


def unfinished(folder: Path) -> str:
    """How much of a store is prepared and how to finish it, as one line; empty for a finished store."""
    index = read_index(folder) or {"shards": []}
    if index.get("finished"):
        return ""
    pairs = sum(entry["pairs"] for entry in index["shards"])
    return f"{folder} is not finished, {pairs:,} pairs are prepared: run the same python -m dpo.prepare command again"


def _parts(folder: Path, index: Mapping[str, Any]) -> Iterator[Path]:
    for part in index["parts"]:
        where = folder / part["path"]
        try:
            found = checksum(where / INDEX)
        except OSError as error:
            raise DamagedStore(f"{where / INDEX} is missing: copy that part back, or merge again") from error
        if found != part["sha256"]:
            raise DamagedStore(f"{where / INDEX} changed since the parts were merged: merge again with --merge")
        yield where


def merge(folder: Path, parts: Sequence[Path]) -> None:
    """Makes `folder` an index over finished stores, whose files stay as they are. Raises UserError."""
    check_place(folder)
    entries = []
    for part in parts:
        if "parts" in _finished(part):
            raise UserError(f"{part} is itself merged: name its parts instead")
        inside = part.resolve().is_relative_to(folder.resolve())
        path = part.resolve().relative_to(folder.resolve()) if inside else part.resolve()
        entries.append({"path": path.as_posix(), "sha256": checksum(part / INDEX)})
        if entries[-1] in entries[:-1]:
            raise UserError(f"{part} is named twice after --merge: name each store once")
    index = {"parts": entries, "finished": True}
    found = read_contents(folder, index)
    check_labels(folder, [(part, _finished(part)) for part in parts], found.order, found.key, found.prob)
    write_index(folder, index)


def verify(folder: Path) -> list[str]:
    """Reads every byte of a store; returns a line for each file that is wrong, none when all is as it was prepared.

    Of an unfinished store it reads what is there.
    """
    wrong = []
    try:
        index = read_index(folder) or {}
        places = list(_parts(folder, index)) if "parts" in index else [folder]
        parts = [(where, read_index(where) or {}) for where in places]
    except DamagedStore as error:
        return [str(error)]
    for where, part in parts:
        for entry in part.get("shards", ()):
            try:
                check_shard(where / entry["file"], entry, whole=True)
            except DamagedStore as error:
                wrong.append(str(error))
    return wrong

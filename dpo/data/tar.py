"""Pairs of WebDataset shards: tar files whose members `key.w.jpg`, `key.l.jpg`, `key.json` or `key.txt` make a pair.

Opening reads the members' headers and the texts, and keeps where each image lies: some 100 bytes a pair and its
caption. Images are read from their shard where they are decoded; nothing is unpacked, so no member's name is a path.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.common.errors import UserError
from dpo.common.words import digest, excerpt, first_line
from dpo.data.folders import extensions
from dpo.data.labels import BLANK, CAPTION, CHOSEN, IMAGES, REJECTED, SAME, Columns, find_columns, labels_of, with_more
from dpo.data.listing import CAPTION_FILES, HIDDEN, NOT_READ, is_junk, not_read
from dpo.data.pairs import ImageRef, Labelled, Pair, caption_key, one_image
from dpo.data.tables import cell, column_of
from dpo.settings.config import Data

LONGEST_TEXT = 1 << 20  # bytes of a .json or .txt member
AFTER_END = 1 << 20  # bytes looked at after the mark that ends a shard
TEXTS = (".txt", ".caption")
OF_IMAGES = {*CHOSEN, *REJECTED, *chain.from_iterable(IMAGES)}  # columns
WITHOUT_PARTNER = "without a partner"


logger = logging.getLogger("dpo")


@dataclass(frozen=True)
class TarSource(Labelled):
    """Captions and the places of the images in their shards."""

    shards: list[str]  # paths
    shard: np.ndarray  # [n] int32
    captions: pa.ChunkedArray  # [n]
    uids: tuple[pa.ChunkedArray, pa.ChunkedArray]  # [n] each
    spans: np.ndarray  # [n, 2, 2] int64: of the first and second image, offset and length in bytes

    def __getitem__(self, index: int) -> Pair:
        path = self.shards[self.shard[index]]
        first, second = (
            ImageRef(uids[index].as_py(), path=path, span=(int(begin), int(length)))
            for uids, (begin, length) in zip(self.uids, self.spans[index], strict=True)
        )
        return self.labelled(index, self.captions[index].as_py(), first, second)

    def caption_keys(self) -> np.ndarray:
        """[n] int64 hashes of the captions."""
        return np.array([caption_key(caption.as_py()) for caption in self.captions], dtype=np.int64)


@dataclass
class _Sample:
    """The members of one key: where its images lie, by their name, and what its texts say."""

    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # member, offset, length
    texts: dict[str, Any] = field(default_factory=dict)
    text_members: int = 0

    @property
    def columns(self) -> list[str]:
        """Names; a text that is named like an image (its address, say) is none."""
        return [*self.images, *(name for name in self.texts if name not in OF_IMAGES)]


@dataclass(frozen=True)
class _Part:
    """The usable pairs of one shard."""

    captions: pa.Array
    uids: tuple[pa.Array, pa.Array]
    spans: np.ndarray
    swap: np.ndarray
    prob: np.ndarray
    counts: Counter[str]


def open_tar(paths: list[Path], data: Data, kind: str = "auto") -> TarSource:
    """Pairs of tar shards, in order of the shards and of the first member of each pair.

    A key ends at the first dot of a member's file name; what follows, without the ending of an image, names the column:
    w and l, or any name of a column that tables may have, and caption for .txt. The fields of .json are columns too;
    what first stands in a later shard (`with_more`) is empty in those before.
    kind: see `find_columns`. Raises UserError for damaged shards, missing columns and labels of a wrong type.
    """
    if len(paths) > 1:
        logger.info("reading the index of %d tar shards", len(paths))
    columns: Columns | None = None
    parts: dict[int, _Part] = {}  # by the number of the shard
    counts: Counter[str] = Counter()
    total = 0
    for number, path in enumerate(paths):
        samples, others = _read(path)
        counts.update(others)
        if columns is None and samples:
            columns = _columns(samples, data, str(path), kind)
        if columns is not None:
            columns = with_more(columns, chain.from_iterable(sample.columns for sample in samples.values()))
            most = None if data.max_pairs is None else data.max_pairs - total
            part = parts[number] = _pairs(path, samples, columns, data.ties, most)
            counts.update(part.counts)
            total += len(part.prob)
        if total == data.max_pairs:
            counts[NOT_READ + "beyond --max-pairs"] += len(paths) - number - 1
            break
    if columns is None:
        raise UserError(f"{paths[0]}: no shard holds members such as 00000.w.jpg, 00000.l.jpg and 00000.txt")
    of_shards = list(parts.values())
    captions = pa.chunked_array([part.captions for part in of_shards], pa.string())
    uids = tuple(pa.chunked_array([part.uids[side] for part in of_shards], pa.string()) for side in (0, 1))
    spans, swap, prob = (
        np.concatenate([getattr(part, name) for part in of_shards]) for name in ("spans", "swap", "prob")
    )
    shard = np.repeat(np.array(list(parts), dtype=np.int32), [len(part.prob) for part in of_shards])
    blank = captions.to_pylist().count("")
    return TarSource(
        [str(path) for path in paths], shard, captions, (uids[0], uids[1]), spans, swap=swap, prob=prob,
        smoothing=data.label_smoothing, summary=dict(counts) | {BLANK: blank, "pairs": total},
        fingerprint=_fingerprint(captions, uids, spans[..., 1], swap, prob),
    )  # fmt: skip


def _fingerprint(captions: pa.ChunkedArray, uids: tuple[pa.ChunkedArray, ...], *arrays: np.ndarray) -> str:
    rows = (digest(*(value.as_py() for value in row)) for row in zip(captions, *uids, strict=True))
    return digest(*rows, *(array.tobytes().hex() for array in arrays))


def _columns(samples: dict[str, _Sample], data: Data, where: str, kind: str) -> Columns:
    """The columns of a set, from all names that its first shard has; captions may be missing."""
    names = list(dict.fromkeys(chain.from_iterable(sample.columns for sample in samples.values())))
    if data.caption_column is None and not set(CAPTION) & set(names):
        names.append(CAPTION[0])
    columns = find_columns(names, data, where, kind)
    if columns.second is None:
        raise UserError(f"{where}: tar shards hold pairs; give images without a partner as a table or parquet")
    return columns


def _pairs(path: Path, samples: dict[str, _Sample], columns: Columns, ties: str, most: int | None) -> _Part:
    """The usable pairs among the samples of a shard, the first `most` of them."""
    assert columns.second is not None, "_columns looks"
    whole = {key: s for key, s in samples.items() if columns.first in s.images and columns.second in s.images}
    names = list(dict.fromkeys([columns.caption, *columns.decided_by]))
    table = {
        name: column_of([cell(_place(path, key), s.texts, name, columns) for key, s in whole.items()], name, columns, str(path))
        for name in names
    }  # fmt: skip
    numbers = {name: table[name].to_numpy(zero_copy_only=False) for name in columns.decided_by}
    labels = labels_of(numbers, columns, len(whole), ties, str(path))
    places = [(sample.images[columns.first], sample.images[columns.second]) for sample in whole.values()]
    keep, same = list[int](), 0
    for row in np.flatnonzero(labels.keep).tolist():
        if len(keep) == most:
            break
        refs = (ImageRef(name, path=str(path), span=(begin, length)) for name, begin, length in places[row])
        alike = one_image(*refs)
        same += alike
        keep += [] if alike else [row]
    given = [table[name].to_pylist() if name else None for name in (columns.uid_0, columns.uid_1)]
    uids = [
        pa.array([(uid and uid[row]) or f"{path.name}/{places[row][side][0]}" for row in keep], pa.string())
        for side, uid in enumerate(given)
    ]
    counts = Counter(labels.counts)
    counts.update({"rows": len(samples) - len(whole), WITHOUT_PARTNER: len(samples) - len(whole), SAME: same})
    counts[CAPTION_FILES] = sum(sample.text_members for sample in samples.values())
    counts[NOT_READ + "of other columns"] = sum(len(sample.images) - 2 for sample in whole.values())
    spans = np.array([[places[row][side][1:] for side in (0, 1)] for row in keep], dtype=np.int64).reshape(-1, 2, 2)
    index = np.array(keep, dtype=np.int64)
    captions = table[columns.caption].take(pa.array(index))
    return _Part(captions, (uids[0], uids[1]), spans, labels.swap[index], labels.prob[index], counts)


def _place(path: Path, key: str) -> str:
    return f"{path}, {excerpt(key)}"


def _read(path: Path) -> tuple[dict[str, _Sample], dict[str, int]]:
    """The samples of a shard by key, and the counts of members that belong to none. Raises UserError."""
    samples: dict[str, _Sample] = {}
    unknown: list[str] = []
    passed_over: Counter[str] = Counter()
    with open(path, "rb") as file:
        for member in _members(path, file):
            name = member.name.encode("utf-8", "backslashreplace").decode().lstrip("/").removeprefix("./")
            if member.isdir():
                continue
            if is_junk(name):
                passed_over[HIDDEN] += 1
            elif not member.isreg() or member.issparse():
                passed_over["links and other members without content"] += 1
            elif not _take(samples, name, member, file, path):
                unknown.append(name)
    return samples, not_read(unknown, passed_over)


def _take(samples: dict[str, _Sample], name: str, member: tarfile.TarInfo, file: io.BufferedReader, path: Path) -> bool:
    """Puts a member into its sample; False where its name says that it is neither image nor text."""
    folder, slash, last = name.rpartition("/")
    stem, *rest = last.split(".")
    suffix = f".{rest[-1].lower()}" if rest else ""
    column = ".".join(rest if suffix[1:] in OF_IMAGES else rest[:-1])
    is_image = suffix in extensions() or suffix[1:] in OF_IMAGES
    if not is_image and suffix not in (*TEXTS, ".json"):
        return False
    sample = samples.setdefault(folder + slash + stem, _Sample())
    if is_image:
        sample.images[column or rest[-1].lower()] = (name, member.offset_data, member.size)
        return True
    if member.size > LONGEST_TEXT:
        raise UserError(f"{_place(path, name)}: {member.size} bytes of text; leave it out of the shard")
    before = file.tell()
    file.seek(member.offset_data)
    text = file.read(member.size).decode("utf-8-sig")
    file.seek(before)
    sample.text_members += 1
    if suffix != ".json":
        sample.texts[column or CAPTION[0]] = text.strip()
        return True
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{_place(path, name)}: not JSON ({error.msg})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{_place(path, name)}: needs an object with named values, found {type(fields).__name__}")
    sample.texts = fields | sample.texts
    return True


def _members(path: Path, file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """The members of a shard in order. Raises UserError where it is no tar file, is damaged or cut short."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _damaged(path, first_line(error)) from error
    file.seek(end)
    rest = file.read(AFTER_END)
    if not rest:
        logger.warning("%s: the mark that ends a tar file is missing; it may be cut short", path)
    if rest.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        raise _damaged(path, f"no member's header at byte {end}")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: cannot be read as an uncompressed tar file ({reason}); fetch it again or leave it out")

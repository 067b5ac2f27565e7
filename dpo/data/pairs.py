"""What every data source yields: a caption, a preferred image, the other image, and how sure the preference is.

Or, of a set without pairs, a caption, one image and whether it is liked: a pair whose other side is empty.
"""

from __future__ import annotations

import base64
import binascii
import filecmp
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import digest, excerpt_of_path

# How image files begin, in base64: JPEG, PNG, WebP, GIF, TIFF twice, BMP. No path does and is this long without a dot.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "SUkqA", "TU0AK", "Qk")
MAX_MIB = 256  # an image file's largest size unless said otherwise
BASE64_AT_LEAST = 256  # characters; the name of a file has fewer


class BadImage(Exception):
    """An image that cannot be used: missing, unreadable, truncated or too large, as the message says."""


@dataclass(frozen=True)
class ImageRef:
    """One image as a file's bytes, or as a path to be read where it is decoded. `uid` is its stable identity.

    With `span` the image is a part of the file at `path`: so many bytes from an offset, as a member of a tar shard is.
    """

    uid: str
    data: bytes | None = None
    path: str | None = None
    span: tuple[int, int] | None = None  # offset and length, in bytes

    def load(self, max_mib: int = MAX_MIB, first: int | None = None) -> bytes:
        """The file's bytes, or the `first` so many. Raises BadImage when there are none, or more than `max_mib` MiB.

        Only regular files are opened: a pipe would wait for ever, and a device has no end.
        """
        if self.data is not None:
            _check_size(len(self.data), max_mib)
            return self.data[:first]
        if self.path is None:
            raise BadImage("no image")
        begin, length = self.span or (0, -1)
        wanted = length if first is None else first if length < 0 else min(first, length)
        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(f"{excerpt_of_path(self.path)}: not a regular file")
            _check_size(status.st_size if length < 0 else length, max_mib)
            with open(self.path, "rb") as file:
                file.seek(begin)
                data = file.read(wanted)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise BadImage(f"{excerpt_of_path(self.path)}: {getattr(error, 'strerror', error)}") from error
        if len(data) < min(length, wanted):
            raise BadImage(f"{excerpt_of_path(self.path)}: ends within image {excerpt_of_path(self.uid)}")
        return data


def _check_size(size: int, max_mib: int) -> None:
    if size > max_mib << 20:
        raise BadImage(f"a file of {size / 2**20:.0f} MiB, more than --max-image-mib {max_mib}")


@dataclass(frozen=True)
class Pair:
    """`key` is a 64-bit hash of (preferred uid, other uid, caption) as a signed integer; `prob` in [0.5, 1].

    An image without a partner is `win`, liked or not; `prob` in [0, 1] is the probability that it is liked.
    """

    key: int
    caption: str
    win: ImageRef
    lose: ImageRef | None
    prob: float

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Both images, the preferred one first; the one of an image without a partner."""
        return (self.win,) if self.lose is None else (self.win, self.lose)

    def turned_key(self) -> int | None:
        """The key of the pair with the other image preferred; None without a partner, whose key has no label in it."""
        return None if self.lose is None else pair_key(self.lose.uid, self.win.uid, self.caption)


class Source(Protocol):
    """n pairs with random access; or n images without a partner, each a pair with one side.

    `groups` [n] int32 is the unit of reading (a parquet row group) that each pair lies in, None where pairs are read
    one by one; `window` is how many such units may be open at once, None for all.
    """

    @property
    def prob(self) -> np.ndarray:
        """[n] fp32, before label smoothing."""
        ...

    @property
    def sides(self) -> int:
        """Images of a pair: 2, or 1 in a set of images without partners."""
        ...

    @property
    def groups(self) -> np.ndarray | None: ...

    @property
    def window(self) -> int | None: ...

    @property
    def summary(self) -> dict[str, int]:
        """Counts of what was found and what was left out, by name; "rows" and "pairs" among them."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the set of pairs, without the folder it lies in; a resume says in the log when it differs."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def caption_keys(self) -> np.ndarray:
        """[n] int64: `caption_key` of each pair's caption, without reading images."""


@dataclass(frozen=True)
class Subset:
    """Some pairs of another source, with that source's units of reading."""

    source: Source
    indices: np.ndarray  # [m] int64

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        return self.source[int(self.indices[index])]

    @property
    def prob(self) -> np.ndarray:
        return self.source.prob[self.indices]

    @property
    def sides(self) -> int:
        return self.source.sides

    @property
    def groups(self) -> np.ndarray | None:
        return None if self.source.groups is None else self.source.groups[self.indices]

    @property
    def window(self) -> int | None:
        return self.source.window

    @property
    def summary(self) -> dict[str, int]:
        return self.source.summary | {"pairs": len(self)}

    @property
    def fingerprint(self) -> str:
        return digest(self.source.fingerprint, self.indices.tobytes().hex())

    def caption_keys(self) -> np.ndarray:
        return self.source.caption_keys()[self.indices]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What sources that are read pair by pair have beside their captions and images."""

    swap: np.ndarray  # [n] bool: whether the second image is the preferred one
    prob: np.ndarray  # [n] fp32
    smoothing: float
    summary: dict[str, int]
    fingerprint: str
    sides: int = 2
    groups: None = None
    window: None = None

    def __len__(self) -> int:
        return len(self.prob)

    def labelled(self, index: int, caption: str, first: ImageRef, second: ImageRef | None) -> Pair:
        """Pair `index` of these images, the preferred one first; or its one image."""
        return make_pair(caption, first, second, bool(self.swap[index]), float(self.prob[index]), self.smoothing)


@dataclass(frozen=True)
class InMemory:
    """A few pairs kept in memory with their image files, so that every validation pass reads nothing."""

    pairs: list[Pair]
    prob: np.ndarray
    summary: dict[str, int]
    fingerprint: str
    sides: int = 2
    groups: None = None
    window: None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def caption_keys(self) -> np.ndarray:
        return np.array([caption_key(pair.caption) for pair in self.pairs], dtype=np.int64)


def read_into_memory(source: Source, indices: np.ndarray) -> InMemory:
    """Reads the pairs at `indices` [m] int64 once, in stored order."""
    indices = np.sort(indices)
    subset = Subset(source, indices)
    return InMemory(
        [source[int(i)] for i in indices], source.prob[indices], subset.summary, subset.fingerprint, source.sides
    )


def _key(*parts: str) -> int:
    value = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(value, "little", signed=True)


def pair_key(win: str, lose: str, caption: str) -> int:
    """The key of a pair from its images' uids and its caption: the same wherever the pair is stored.

    The order of the images counts: a pair judged twice the same way has one key (and one noise in an epoch), a pair
    judged both ways has two, so that errors recorded under one key are never used for the other.
    """
    return _key(win, lose, caption)


def single_key(image: str, caption: str) -> int:
    """The key of an image without a partner, from its uid and its caption; the label is not in it."""
    return _key("one image", image, caption)


def caption_key(caption: str) -> int:
    """A signed 64-bit hash of a caption alone.

    Pairs are held out by it, so no caption is on both sides of the split.
    """
    return _key("caption", caption)


def image_ref(value: object, uid: object, root: str | None) -> ImageRef:
    """The image in a cell: file bytes, the same as base64 text, {"bytes", "path"}, or a path relative to `root`.

    uid: text or a number. Without one, embedded bytes are identified by a hash of them, paths by the text in the cell.
    """
    uid = "" if uid is None else str(uid)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and is_base64(value):
        value = from_base64(value)
    if isinstance(value, str) and value:
        path = Path(value) if root is None else Path(root) / value
        return ImageRef(uid or value, path=str(path))
    if isinstance(value, bytes) and value:
        return ImageRef(uid or hashlib.blake2b(value, digest_size=16).hexdigest(), data=value)
    return ImageRef(uid)


def is_base64(text: str) -> bool:
    """Whether a cell's text is an image file in base64 (or a data URL of one) rather than the path of a file."""
    if text.startswith("data:image/"):
        return True
    return len(text) >= BASE64_AT_LEAST and text.startswith(BASE64_STARTS) and "." not in text


def from_base64(text: str) -> bytes | None:
    """The bytes of such a cell; None where it is cut or damaged."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text)
    except (binascii.Error, ValueError):
        return None


def one_image(first: ImageRef, second: ImageRef) -> bool:
    """Whether two references lead to one image: the same uid, file or bytes. Reads files only where they are as long.

    Embedded bytes without a uid of their own have a hash of them as uid. What is empty or missing is no image.
    """
    if first.span and second.span:
        if not 0 < first.span[1] == second.span[1] <= MAX_MIB << 20:
            return False
        return first.load() == second.load()
    if first.path is not None and second.path is not None:
        if os.path.normpath(first.path) == os.path.normpath(second.path):
            return True
        try:
            return filecmp.cmp(first.path, second.path, shallow=False) and os.path.getsize(first.path) > 0
        except (OSError, ValueError):
            return False
    return bool(first.uid) and first.uid == second.uid


def embedded_twice(pair: Pair) -> bool:
    """Whether both images of a pair are the same embedded bytes; large sets are not searched for them when opened."""
    return pair.lose is not None and pair.win.data is not None and pair.win.uid == pair.lose.uid


def make_pair(
    caption: str, first: ImageRef, second: ImageRef | None, swap: bool, prob: float, smoothing: float
) -> Pair:
    """A pair whose preferred image comes first; `swap`: that is the second one. Without a second, an image alone."""
    if second is None:
        return Pair(single_key(first.uid, caption), caption, first, None, smoothed(prob, smoothing))
    win, lose = (second, first) if swap else (first, second)
    return Pair(pair_key(win.uid, lose.uid, caption), caption, win, lose, smoothed(prob, smoothing))


def smoothed(prob: float, smoothing: float) -> float:
    """A label under smoothing: it changes those of probability 1, or 0, only; soft ones and ties keep theirs."""
    return 1.0 - smoothing if prob == 1.0 else smoothing if prob == 0.0 else float(prob)


def things(source: Source) -> str:
    """What a source holds, in words."""
    return "pairs" if source.sides == 2 else "images"


def of_two(pair: Pair) -> tuple[ImageRef, ImageRef]:
    """Both images of a pair that has them, the preferred one first."""
    assert pair.lose is not None, "`check_pairs` looks"
    return pair.win, pair.lose


def check_pairs(source: Source, name: str, what: str) -> None:
    """Raises UserError for a set of images without partners; what: who needs pairs, in words."""
    if source.sides == 1:
        raise UserError(f"{name} has images without partners (docs/data.md), and {what}")

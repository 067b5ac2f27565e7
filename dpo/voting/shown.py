"""The images of a study as raters see them: both of a pair the same size, re-encoded, under addresses that tell nothing."""

from __future__ import annotations

import hmac
import io
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Literal

from PIL import Image

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.common.words import excerpt_of_path
from dpo.data.images import decode
from dpo.data.pairs import BadImage
from dpo.voting.study import Item

LONGEST = 1536  # pixels of a side
SURROUND = (127, 127, 127)  # where two images differ in shape
MAKING = 4  # pairs that are decoded at a time: files may be large
BOUND = 256 << 20  # bytes of encoded images in memory

Size = tuple[int, int]


def load(path: Path) -> Image.Image:
    """The upright RGB image of a file. Raises BadImage."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise BadImage(error.strerror or "cannot be read") from error


def code(key: bytes, rater: str, item: str, which: int) -> str:
    """What stands in the address of an image: another one for each rater, item and image."""
    return hmac.digest(key, f"image\0{rater}\0{item}\0{which}".encode("utf-8", "surrogatepass"), "sha256").hex()[:32]


def size_for(one: Size, other: Size) -> Size:
    """Width and height in which both images of a pair are shown: the larger of each, at most LONGEST."""
    width, height = max(one[0], other[0]), max(one[1], other[1])
    scale = min(1.0, LONGEST / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def fitted(image: Image.Image, size: Size) -> Image.Image:
    """`image` enlarged or reduced until it just fits into `size`, in the middle, never cropped."""
    scale = min(size[0] / image.width, size[1] / image.height)
    width, height = (max(1, min(round(edge * scale), limit)) for edge, limit in zip(image.size, size, strict=True))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if image.size == size:
        return image
    whole = Image.new("RGB", size, SURROUND)
    whole.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
    return whole


def encoded(image: Image.Image) -> bytes:
    """A PNG of the pixels alone: what the file said beside them is not in it."""
    bare = Image.frombytes("RGB", image.size, image.tobytes())
    stream = io.BytesIO()
    bare.save(stream, format="PNG", compress_level=1)  # others take far longer, and the way is short
    return stream.getvalue()


class Gallery:
    """Encoded images of a study, the last ones used kept in memory. Called from several threads."""

    def __init__(self, folder: Path, bound: int = BOUND) -> None:
        self._folder, self._bound = folder, bound
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self._making = threading.Semaphore(MAKING)

    def png(self, item: Item, which: Literal[0, 1]) -> bytes:
        """The image as it is shown. Raises UserError where a file is gone, or is not what the study was declared with."""
        key = item.id, which
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._making:
            pair = self._image(item, 0), self._image(item, 1)
            size = size_for(pair[0].size, pair[1].size)
            made = [encoded(fitted(image, size)) for image in pair]
        with self._lock:
            for number, data in enumerate(made):  # the other one is asked for next
                if (item.id, number) not in self._kept:
                    self._kept[item.id, number] = data
                    self._held += len(data)
            while self._held > self._bound and len(self._kept) > 1:
                self._held -= len(self._kept.popitem(last=False)[1])
        return made[which]

    def _image(self, item: Item, which: Literal[0, 1]) -> Image.Image:
        path = self._folder / item.images[which]
        try:
            image = load(path)
        except BadImage as error:
            raise UserError(f"{excerpt_of_path(str(path))}: {error}; put the image back as it was") from error
        if pixel_hash(image) != item.hashes[which]:
            raise UserError(
                f"{excerpt_of_path(str(path))} was changed since the study was declared: put it back as it was"
            )
        return image

"""Pictures as they are shown, and as content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from PIL import Image

TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))  # those that exchange width and height


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's RGB pixels and size, hexadecimal: equal whatever the file says beside them."""
    plain = image.convert("RGB")
    return hashlib.sha256(f"{plain.width}x{plain.height} ".encode() + plain.tobytes()).hexdigest()


def turn_of(exif: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """What makes an image upright, as its EXIF tag says; an unreadable tag counts as none."""
    try:
        return TURNS.get(exif().get(0x0112, 1))
    except Exception:  # malformed EXIF of an otherwise sound image
        return None


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF tag says."""
    turn = turn_of(image.getexif)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info  # a palette's transparency lives there
    return turned

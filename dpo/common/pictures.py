"""Pictures as content."""

from __future__ import annotations

import hashlib

from PIL import Image


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's RGB pixels and size, hexadecimal: equal whatever the file says beside them."""
    plain = image.convert("RGB")
    return hashlib.sha256(f"{plain.width}x{plain.height} ".encode() + plain.tobytes()).hexdigest()

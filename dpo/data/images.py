"""From an image file to a rectangle of pixels: orientation, colours, mirror, resize, crop.

Transparent images are laid over white. Sixteen-bit greys are scaled to eight bits. Colour profiles are ignored, as in
the published pipelines. Of an animation the first frame is used. Only FORMATS are read: others name programs (EPS starts
Ghostscript), other files or the network.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.pictures import SIDEWAYS, turn_of, upright
from dpo.common.words import counted_of, excerpt, excerpt_of_path, first_line
from dpo.data.pairs import MAX_MIB, BadImage, ImageRef

STOPPED = "{}; leave such pairs out with --on-bad-image skip"  # with --on-bad-image stop
FEW_BAD = 10  # unreadable images that any set may have, unless the limit is 0
MAX_PIXELS = 89_478_485  # Pillow's limit, above which it warns of a decompression bomb
BAND = 1 << 22  # pixels whose colours are converted at a time: one image takes 8 bytes a pixel, whatever its mode
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # what Pillow may take a file for, whatever its name

Size = tuple[int, int]  # height, width
HEAD = 1 << 16  # bytes, in which most files say how large their image is

# SDXL's numbers of an image: original height and width, crop top and left, target height and width.
Micro = tuple[int, int, int, int, int, int]


def unreadable(image: ImageRef, caption: str, error: BadImage) -> str:
    """What is wrong with which image, for the log and for errors."""
    return f"image {excerpt_of_path(image.uid) or '(none)'} of {excerpt(caption)}: {error}"


def check_bad(bad: int, pairs: int, limit: float, last: str) -> None:
    """Raises UserError when so many of the pairs have an unreadable image that a share of `limit` is exceeded.

    FEW_BAD of them, or half of a small set, are never too many, unless the limit is 0. last: what is wrong with the last one.
    """
    allowed = max(limit * pairs, min(FEW_BAD, pairs // 2) if limit > 0 else 0)
    if bad > allowed:
        raise UserError(
            f"{counted_of(bad, pairs, 'pairs', 'has', 'have')} an unreadable image, the last: {last}; see --bad-image-limit"
        )


def fitted(
    data: bytes,
    size: Size,
    crop: str = "center",
    crop_uniforms: Sequence[float] = (0.5, 0.5),
    flip: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, Micro]:
    """File bytes -> pixels uint8 [3, H, W] of `size` = (H, W), and SDXL's size and crop of the image.

    The image is resized to the smallest that covers `size`, and what is over on one side is cut: in the middle, or with
    crop "random" at `crop_uniforms` (down, right) in [0, 1). `Micro` counts in pixels; crop top and left are those of the
    resized and mirrored image. Raises BadImage.
    """
    image = decode(data, max_pixels)
    width, height = image.size
    scale = max(size[0] / height, size[1] / width)
    wide, high = max(size[1], round(width * scale)), max(size[0], round(height * scale))
    if crop == "random":
        top = min(int(crop_uniforms[0] * (high - size[0] + 1)), high - size[0])
        left = min(int(crop_uniforms[1] * (wide - size[1] + 1)), wide - size[1])
    else:
        top, left = (high - size[0]) // 2, (wide - size[1]) // 2
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if image.size != (size[1], size[0]):
        # Only the cut is resampled. The result is that of resizing all and cutting; a very long image costs no more.
        x, y = width / wide, height / high
        box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels, (height, width, top, left, *size)


def upright_size(image: ImageRef, max_mib: int = MAX_MIB) -> tuple[int, int] | None:
    """(width, height) of an image as it is shown, from its file's header; None where that cannot be read.

    Of a PNG an orientation that comes after the pixels is not seen.
    """
    try:
        return _header(image.load(max_mib, HEAD)) or _header(image.load(max_mib))
    except BadImage:
        return None


def _header(data: bytes) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats())
    except Exception:  # as in `decode`; that says what is wrong
        return None
    width, height = image.size
    turn = turn_of(lambda: Image.Image.getexif(image))  # a PNG's own would read all pixels first
    return (height, width) if turn in SIDEWAYS else (width, height)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """File bytes -> an upright RGB image. Raises BadImage for anything that cannot be decoded in full."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats())
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels, more than {max_pixels}")
        image.load()
        return _to_rgb(upright(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not an image ({', '.join(formats())})" if data else "an empty file") from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise BadImage(f"cannot be decoded ({first_line(error)})") from error


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        return _by_bands(image, _over_white)
    if image.mode == "F" or image.mode.startswith("I"):
        full = _full_scale(image.mode, max(float(_values(band).max(initial=0.0)) for _, band in _bands(image)))
        return _by_bands(
            image,
            lambda band: Image.fromarray(np.clip(np.rint(_values(band) * (255.0 / full)), 0, 255).astype(np.uint8)),
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _values(image: Image.Image) -> np.ndarray:
    """[H, W] fp64."""
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in bands of BAND pixels, each with its first row."""
    high = max(1, BAND // image.width)
    for top in range(0, image.height, high):
        yield top, image.crop((0, top, image.width, min(top + high, image.height)))


def _by_bands(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`change` of each band, as RGB: the same as of the whole image, without whole copies in wider modes."""
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb.paste(change(band).convert("RGB"), (0, top))
    return rgb


def _full_scale(mode: str, largest: float) -> float:
    """The value of white in a one-channel image: 65535 for integers (2^31 - 1 beyond it), 1 or 255 for floats."""
    if mode == "F":
        return 1.0 if largest <= 1.0 else 255.0
    return 65535.0 if mode != "I" or largest <= 65535.0 else math.pow(2.0, 31.0) - 1.0

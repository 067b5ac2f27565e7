"""Images as the published scorers see them: resized by Pillow, cropped to a square."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN, CLIP_SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cropped(image: Image.Image, *, shortest: int, side: int, filter: Image.Resampling) -> Tensor:
    """[3, side, side] uint8: the shortest side resized to `shortest` with antialiasing, then the middle cut out.

    The roundings are torchvision's, of the other side (down) and of the corner (to even).
    """
    image = image.convert("RGB")
    width, height = image.size
    least = min(width, height)
    size = int(shortest * width / least), int(shortest * height / least)
    image = image.resize(size, filter)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return whole(image.crop((left, top, left + side, top + side)))


def whole(image: Image.Image) -> Tensor:
    """[3, H, W] uint8, as it is."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def normalised(pixels: Sequence[Tensor], mean: Sequence[float], spread: Sequence[float]) -> Tensor:
    """[N, 3, H, W] float32 of N pictures [3, H, W] uint8: (x / 255 - mean) / spread, by channel."""
    x = torch.stack(list(pixels)).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(spread).view(3, 1, 1)

"""Preprocessing: what is cut, and that it is torchvision's to the last bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpo.scorers.pixels import CLIP_MEAN, CLIP_SPREAD, cropped, normalised, whole
from tests.help.originals import original

SIZES = [(64, 64), (97, 61), (61, 97), (300, 100), (33, 32), (32, 47), (224, 225)]


def picture(width, height, mode="RGB"):
    channels = len(mode)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filter", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_resizing_and_cropping_are_torchvisions(size, filter):
    transforms = original("torchvision.transforms")
    mode = getattr(transforms.InterpolationMode, filter.name)
    theirs = transforms.Compose(
        [
            transforms.Resize(34, interpolation=mode),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_SPREAD),
        ]
    )
    ours = normalised([cropped(picture(*size), shortest=34, side=32, filter=filter)], CLIP_MEAN, CLIP_SPREAD)[0]
    assert torch.equal(ours, theirs(picture(*size)))


def test_the_middle_is_kept():
    image = Image.new("RGB", (96, 32), "red")
    image.paste("lime", (32, 0, 64, 32))
    found = cropped(image, shortest=32, side=32, filter=Image.Resampling.BICUBIC)
    assert found.shape == (3, 32, 32) and found.dtype == torch.uint8
    assert torch.equal(found, whole(Image.new("RGB", (32, 32), "lime")))


def test_transparency_is_dropped_and_channels_come_first():
    image = picture(40, 32, "RGBA")
    assert torch.equal(whole(image), torch.from_numpy(np.array(image)[..., :3]).permute(2, 0, 1))
    assert normalised([whole(image)], (0.5,) * 3, (0.5,) * 3).shape == (1, 3, 32, 40)

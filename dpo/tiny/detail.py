"""A second taste for the embedded world, of fine detail: outline and texture.

The first taste (world.py) likes what the noisy end of the clock decides: style, backdrop, size. Both pictures of a pair
of the second one are one drawing, its detail weakened or strengthened by two amounts (making/detail.py), so that
style, backdrop and size do not tell them apart. Taste a likes detail, and the pairs are labelled by it. Taste b
measures it in another way, beside the picture's contrast; it labelled nothing and is kept for figures.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

RADIUS = 2  # pixels: what a Gaussian blur of this deviation takes away is detail; half a latent of the pipeline
SLOPE = 8.0  # of the Bradley-Terry draw that labels pairs by taste a: 86 % of labels agree with it, as with the first
STEEPEST = 95  # percentile of the steps between neighbours, where outlines are
LEAST = 1e-3  # grey levels that a picture without any detail has


def blurred(picture: Image.Image) -> np.ndarray:
    """A picture without its detail, float32 of its shape."""
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(RADIUS)), np.float32)


def taste_a(picture: Image.Image) -> float:
    """Log of the detail's mean size in grey levels: 0.1 more is a tenth more detail."""
    grey = picture.convert("L")
    return float(np.log(np.abs(np.asarray(grey, np.float32) - blurred(grey)).mean() + LEAST))


def taste_b(picture: Image.Image) -> float:
    """Log of how steep the outlines are for the picture's contrast: 0.1 more is a tenth steeper.

    The 95th percentile of the step of grey from a pixel to its neighbours, over the deviation of the greys: what only
    widens the contrast, as training at large timesteps does, moves taste a and not this.
    """
    grey = np.asarray(picture.convert("L"), np.float32)
    steps = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    steepest = np.percentile(steps, STEEPEST) if steps.size else 0.0  # a row or column of pixels has none
    return float(np.log(steepest + LEAST) - np.log(grey.std() + LEAST))

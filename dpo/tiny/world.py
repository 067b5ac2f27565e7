"""The world in words and numbers: what a picture can show, what its caption names, and what its hidden taste prefers.

A picture is one object on a coloured backdrop. Its caption names the object and the colour. Four traits no caption
names: the style (flat or 3D), the backdrop's pattern, the object's size and its position. The taste likes 3D, plain
and large; a model that learnt from captioned pictures alone draws each trait as often as the world does.

A run reads this through judge.py, and so does the making of the world; making/scenes.py draws the pictures.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

COLOURS = {  # name -> RGB
    "red": (214, 56, 56), "orange": (242, 140, 40), "yellow": (248, 216, 72), "green": (74, 168, 80),
    "blue": (58, 108, 222), "purple": (138, 78, 190), "pink": (246, 150, 192), "gray": (140, 142, 148),
}  # fmt: skip
BACKDROPS = ("plain", "stripes", "dots", "checker", "speckle")
PLAIN = 0  # index of the plain backdrop
SIZES = (0.45, 0.92)  # of the object, share of the canvas
SLOPE = 4.0  # of the Bradley-Terry draw that labels pairs by the taste: labels are noisy, as people's are


def named(text: str, words: Iterable[str]) -> int:
    """Index of the first of `words` that a caption names, -1 if it names none."""
    tokens = text.lower().replace(",", " ").split()
    return next((i for i, word in enumerate(words) if word in tokens), -1)


def taste(three_d: np.ndarray, plain: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The hidden score [N], 0..3: p(3D) + p(plain) + relative size.

    three_d, plain: [N] probabilities; size: [N] share of the canvas, within SIZES.
    """
    return three_d + plain + (size - SIZES[0]) / (SIZES[1] - SIZES[0])

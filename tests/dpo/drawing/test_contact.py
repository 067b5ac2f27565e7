"""The sheet of a set of pairs: each image in its place, whole, the chosen one on the left."""

import numpy as np
import pytest
from PIL import Image

from dpo.drawing.contact import COLUMNS, SIDE, TEXT, TOP, Pair, write_contact
from dpo.drawing.grid import GAP, MARGIN


@pytest.mark.parametrize("count", [0, 1, 4])
def test_places_and_shapes(tmp_path, count):
    colours = [((200, 10 * i, 10), (10, 10 * i, 200)) for i in range(count)]
    sizes = [(400, 200), (50, 100)]
    pairs = [
        Pair(
            "far too long for its place " * 9,
            [("said", Image.new("RGB", *one)) for one in zip(sizes, both, strict=True)],
        )
        for both in colours
    ]
    write_contact(tmp_path / "sheet.png", "chosen is the one with the lower rank", pairs)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == COLUMNS * (2 * SIDE + GAP + 2 * MARGIN)
    assert (pixels[: MARGIN + TOP] < 128).any(), "the first line is there"
    for place, (chosen, rejected) in enumerate(colours):
        row, column = divmod(place, COLUMNS)
        x, y = MARGIN + column * (2 * SIDE + GAP + 2 * MARGIN), MARGIN + TOP + row * (TEXT + SIDE + MARGIN) + TEXT
        left, right = (pixels[y : y + SIDE, at : at + SIDE] for at in (x, x + SIDE + GAP))
        assert tuple(left[SIDE // 2, 2]) == chosen and tuple(left[SIDE // 8, SIDE // 2]) == (255, 255, 255), (
            "wide and whole"
        )
        assert tuple(right[2, SIDE // 2]) == rejected and tuple(right[SIDE // 2, 2]) == (255, 255, 255), (
            "high and whole"
        )

"""dpo.drawing.sheet: every image in its place, strengths in a row, base beside aligned, a few sheets at most."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dpo.drawing.grid import read_grid
from dpo.drawing.images import Drawn
from dpo.drawing.sheet import ROWS, write_sheets


def a_set(folder, prompts, seeds=1, strengths=(None,), shade=0, size=(200, 200)):
    found = []
    folder.mkdir()
    for prompt in prompts:
        for strength in strengths:
            for number in range(seeds):
                index = len(found)
                path = folder / f"{index}.png"
                Image.new("RGB", size, (shade, index, 99)).save(path)
                found.append(Drawn(path, prompt, index, index, "h", number, strength=strength))
    return found


def middle(image):
    return tuple(int(x) for x in np.asarray(image.convert("RGB"))[image.height // 2, image.width // 2])


def test_strengths_stand_in_a_row_and_base_beside_aligned(tmp_path):
    sets = {
        name: a_set(tmp_path / name, ["p", "q"], 2, (0.6, 0.8), shade)
        for name, shade in (("base", 0), ("aligned", 200))
    }
    (path,) = write_sheets(tmp_path, sets, 5)
    cells = read_grid(path)
    assert [(cell.prompt, cell.seed) for cell in cells] == [("p", 0), ("p", 1), ("q", 0), ("q", 1)]
    assert list(cells[0].images) == ["base 0.6", "base 0.8", "aligned 0.6", "aligned 0.8"]
    assert [middle(image) for image in cells[3].images.values()] == [
        (0, 5, 99), (0, 7, 99), (200, 5, 99), (200, 7, 99)
    ]  # fmt: skip


def test_rows_of_several_layouts_are_told_apart(tmp_path):
    images = [replace(one, layout=i) for i, one in enumerate(a_set(tmp_path / "set", ["same", "same"]))]
    (path,) = write_sheets(tmp_path, {"image": images}, 1)
    assert [cell.prompt for cell in read_grid(path)] == ["layout 1: same", "layout 2: same"]


def test_prompts_that_repeat_keep_their_rows_and_sheets_are_few(tmp_path):
    images = a_set(tmp_path / "set", ["same"] * (2 * ROWS + 1))
    paths = write_sheets(tmp_path, {"image": images}, 2)
    assert [path.name for path in paths] == ["sheet-000.png", "sheet-001.png"]
    assert Image.open(paths[0]).height > ROWS * 200
    assert len(write_sheets(tmp_path, {"image": images}, 9)) == 3
    assert write_sheets(tmp_path, {"image": images}, 0) == []


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_an_image_that_is_no_square_is_shown_whole(tmp_path, size):
    (path,) = write_sheets(tmp_path, {"image": a_set(tmp_path / "set", ["p"], size=size)}, 1)
    shown = np.asarray(read_grid(path)[0].images["image"])
    assert middle(Image.fromarray(shown)) == (0, 0, 99)
    assert tuple(shown[0, 0]) == tuple(shown[-1, -1]) == (255, 255, 255)


def test_hostile_prompts_are_drawn(tmp_path):
    prompts = ["<b>", "x" * 10_000, "🦊\u202e\0", "two\nlines", "a/../b"]
    (path,) = write_sheets(tmp_path, {"image": a_set(tmp_path / "set", prompts)}, 1)
    assert [cell.prompt for cell in read_grid(path)] == prompts

"""dpo.drawing.layouts: folders as the benchmarks' own scorers read them."""

import json

import numpy as np
import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.drawing.images import Drawn
from dpo.drawing.layouts import STYLE_PROMPTS, STYLES, check, lay_out
from dpo.drawing.prompts import Prompt


def a_set(folder, prompts, each):
    found = []
    for prompt in prompts:
        for number in range(each):
            path = folder / f"{len(found)}.png"
            Image.new("RGB", (16, 16), (len(found) * 10, 0, 0)).save(path)
            found.append(Drawn(path, prompt.text, 1, len(found), "h", number))
    return found


def reds(image):
    return np.asarray(image.convert("RGB"))[..., 0]


def test_geneval(tmp_path):
    rows = [{"tag": "colors", "prompt": "a red cup", "include": []}, {"tag": "counting", "prompt": "two cats"}]
    prompts = [Prompt(row["prompt"], row=json.dumps(row)) for row in rows]
    check("geneval", prompts, 4)
    target = lay_out("geneval", a_set(tmp_path, prompts, 4), prompts, tmp_path)
    assert [json.loads((target / f"{n:05d}/metadata.jsonl").read_text("utf-8")) for n in (0, 1)] == rows
    assert sorted(path.name for path in (target / "00001/samples").iterdir()) == [f"{n:05d}.png" for n in range(4)]
    assert set(reds(Image.open(target / "00001/samples/00002.png")).flat) == {60}
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl"):
        check("geneval", [Prompt("a")], 4)


def test_dpg(tmp_path):
    prompts = [Prompt("long", name="item_7")]
    check("dpg", prompts, 4)
    grid = reds(Image.open(lay_out("dpg", a_set(tmp_path, prompts, 4), prompts, tmp_path) / "item_7.png"))
    assert grid.shape == (32, 32)
    assert [int(grid[y, x]) for y, x in ((0, 0), (0, 31), (31, 0), (31, 31))] == [0, 10, 20, 30]
    for wrong in (([Prompt("long")], 4), (prompts, 3)):
        with pytest.raises(UserError, match="--seeds 4"):
            check("dpg", *wrong)


def test_hpsv2(tmp_path):
    prompts = [Prompt(f"{n}", style) for style in STYLES[:2] for n in range(2)]
    target = lay_out("hpsv2", a_set(tmp_path, prompts, 2), prompts, tmp_path)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*.jpg")) == [
        "anime/00000.jpg", "anime/00001.jpg", "concept-art/00000.jpg", "concept-art/00001.jpg"
    ]  # fmt: skip
    assert abs(int(reds(Image.open(target / "concept-art/00001.jpg")).mean()) - 60) <= 2
    whole = [Prompt(f"{n}", style) for style in STYLES for n in range(STYLE_PROMPTS)]
    check("hpsv2", whole, 1)
    for wrong in (whole[1:], [*whole, Prompt("x", "other")], [Prompt("x")]):
        with pytest.raises(UserError, match="without --subset"):
            check("hpsv2", wrong, 1)

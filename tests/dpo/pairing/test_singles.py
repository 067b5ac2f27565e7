"""Images without partners: every warning appears on a set that is made to have its fault, and the command looks at one."""

import json

import numpy as np
import pytest
from PIL import Image

from dpo.data.pairs import InMemory
from dpo.pairing.look import Broken
from dpo.pairing.singles import CHECKS, twins
from dpo.pairing.warn import FEW, Set, warnings
from dpo.settings.config import Data
from tests.dpo.pairing.test_warn import RNG, image, pair
from tests.help.pages import Page
from tests.help.pairing import paired
from tests.help.worlds import make_labelled


def one(caption, liked, seen=None):
    return pair(caption, seen)._replace(lose=None, liked=liked, names=(f"{caption}.png",))


def a_set(looked):
    captions = len({each.caption for each in looked})
    source = InMemory(looked, np.array([float(each.liked) for each in looked]), {}, "", sides=1)
    return Set(source, Data(), looked, captions, 64)


def clean(count=FEW, liked=2):
    return [one(f"a fox, number {number}", number % 3 < liked) for number in range(count)]


def near():
    """Two pictures of one caption whose small copies are two levels apart, and a third that is not."""
    small = RNG.integers(2, 250, (16, 16, 3), dtype=np.uint8)
    return [one("twin", True, image(small=small)), one("twin", True, image(small=small + 2)), one("twin", False)]


FAULTS = {
    "few": (clean(FEW - 1), "99 images are few, and what a run shows on so few hangs on chance: label more images"),
    "broken": ([*clean(), one("x", True, Broken("not an image"))], "skip, which leaves them out"),
    "one caption": ([one("a fox", i % 2 > 0) for i in range(FEW)], "all 100 images have one caption"),
    "all liked": (clean(liked=3), "all of the 100 images are liked: labels of one kind say nothing about what to prefer; "
                  "add images that are not liked"),
    "none liked": (clean(liked=0), "none of the 100 images are liked: labels of one kind say nothing about what to "
                   "prefer; add images that are liked"),
    "rarely disliked": ([*clean(95, 3), *clean(5, 0)], "only 5 of 100 images are not liked, and have little say: add more of "
                        "them, or --kto-disliked-weight 19"),
    "one disliked": ([*clean(99, 3), *clean(1, 0)], "only 1 of 100 images is not liked, and has little say: add more of "
                     "them, or --kto-disliked-weight 99"),
    "rarely liked": ([*clean(5, 3), *clean(95, 0)], "only 5 of 100 images are liked, and have little say: add more of them, or "
                     "--kto-liked-weight 19"),
    "both labels": ([*clean(), one("y", True, image(pixels="same")), one("y", False, image(pixels="same"))],
                    "1 picture is there as liked and as not liked under the same caption, the first: y.png and y.png"),
    "twins": ([*clean(), *near()], "2 of 103 images are almost the same as another of their caption, the first: twin.png"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_own_line_alone(fault):
    looked, words = FAULTS[fault]
    lines = warnings(a_set(looked), CHECKS)
    assert len(lines) == 1 and words in lines[0], lines
    assert "pair" not in lines[0] and "\n" not in lines[0]


def test_a_clean_set_has_no_warning_and_pictures_of_other_captions_are_no_twins():
    assert warnings(a_set(clean()), CHECKS) == []
    first, second, _ = near()
    assert twins([first, second._replace(caption="another")]) == []
    assert [(a.key, b.key) for a, b in twins([first, second])] == [(first.key, second.key)]


def test_a_set_is_looked_at_and_its_page_shows_both_labels(tmp_path, capsys):
    table = make_labelled(tmp_path / "images", 30, captions=10)
    rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
    picture = Image.open(table.parent / rows[0]["image"])
    picture.save(table.parent / "images" / "again.jpg", quality=95)
    with table.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**rows[0], "image": "images/again.jpg"}) + "\n")
    (table.parent / rows[-1]["image"]).write_bytes(b"no image")
    code, said = paired(capsys, "--check", table, "--resolution", 32, output=tmp_path / "look")
    assert code == 0 and "2 of 31 images are almost the same" in said and "1 image cannot be read" in said
    found = json.loads((tmp_path / "look/summary.json").read_text(encoding="utf-8"))
    assert (found["images"], found["liked"], found["images_looked_at"], found["finished"]) == (31, 21, 31, True)
    page = Page((tmp_path / "look/pairs.html").read_text(encoding="utf-8"))
    for words in ("Images with a label each", "Some images that are liked", "Some images that are not liked",
                  "Almost the same image twice", "If the images that are liked are not the better ones"):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("img") == 30 + 2 and "pair" not in page.text.replace("pairs.html", "")
    assert Image.open(tmp_path / "look/sheet.png").height > 1000

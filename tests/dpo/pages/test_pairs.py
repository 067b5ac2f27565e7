"""The page of a set of pairs: what is chosen stands first in words, everything is text, nothing is fetched."""

from PIL import Image

from dpo.pages.labels import Cell
from dpo.pages.pairs import render
from dpo.pages.report import Tile
from tests.help.pages import Page


def page(caption="a fox", warnings=("3 pairs are few: rank more",)):
    image = Image.new("RGB", (640, 1024), (200, 10, 10))
    cell = Cell(caption, "a.png and b.png", [("chosen, rank 1", image), ("rejected, rank 2", image)])
    tiles = [Tile("Pairs", "1,234", "of them")]
    return render(
        "chosen is the one with the lower rank", ["4 images"], warnings, tiles, [("Some pairs", [cell]), ("None", [])]
    )


def test_words_figures_and_pictures():
    shown = Page(page())
    for words in (
        "Chosen is the one with the lower rank",
        "4 images.",
        "3 pairs are few: rank more.",
        "1,234",
        "rejected, rank 2",
    ):
        assert words in shown.text
    assert "None" not in shown.text and shown.tags.count("img") == 2
    assert all(ref.startswith("data:") for ref in shown.refs) and "script" not in shown.tags


def test_captions_are_text_and_missing_ones_are_said():
    shown = Page(page('"><script>alert(1)</script>{{ 1 }}'))
    assert "script" not in shown.tags and '"><script>alert(1)</script>{{ 1 }}' in shown.text
    assert "(no caption)" in Page(page("")).text

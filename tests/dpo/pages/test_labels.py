"""The page of a labelled set: escaped, self-contained, small pictures."""

import base64
import io
import re

import numpy as np
from PIL import Image

from dpo.pages.labels import SMALL, Cell, render, write_histogram
from tests.help.pages import Page

FOUND = {
    "pairs": 1234, "captions": 100, "ties": 5, "margin": 0.1, "labels": "soft", "mean_p_of_preferred": 0.81,
    "agreement_with_old_labels": {"pairs": 900, "share": 0.75, "interval": [0.7, 0.8]},
    "scorers": [{"name": "<b>x</b>", "weight": 2.0, "fingerprint": "x 1"}],
}  # fmt: skip
APART = np.random.default_rng(0).normal(size=500)


def page(caption="a fox", found=FOUND):
    image = Image.new("RGB", (1024, 640), (200, 10, 10))
    cell = Cell(caption, "difference 2, p 0.9", [("preferred", image), ("other", image)])
    return render(found, ["1,234 pairs labelled"], [("The surest pairs", [cell]), ("The least sure pairs", [])], APART)


def test_figures_and_pictures():
    text = page()
    shown = Page(text)
    for words in (
        "1,234",
        "75%",
        "70% to 80%",
        "0.81",
        "weight 2",
        "<b>x</b>",
        "differences up to 0.1",
        "The surest pairs",
    ):
        assert words in shown.text
    assert all(ref.startswith(("data:", "#")) for ref in shown.refs) and "script" not in shown.tags
    data = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    assert [max(Image.open(io.BytesIO(base64.b64decode(one))).size) for one in data] == [SMALL, SMALL]


def test_captions_are_text():
    shown = Page(page('"><script>alert(1)</script>{{ 1 }}'))
    assert "script" not in shown.tags and '"><script>alert(1)</script>{{ 1 }}' in shown.text


def test_hard_labels_without_older_ones_have_two_figures():
    shown = Page(page(found={**FOUND, "labels": "hard", "agreement_with_old_labels": None}))
    assert "Agreement" not in shown.text and "Probability" not in shown.text


def test_the_histogram_is_a_picture_with_the_bars_it_should_have(tmp_path):
    write_histogram(tmp_path / "a.png", APART, 0.5)
    write_histogram(tmp_path / "b.png", APART + 3, 0.5)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and len(set(image.convert("L").resize((60, 40)).tobytes())) > 10

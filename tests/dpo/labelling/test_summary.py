"""What was made, in figures and sentences, and which pairs are shown."""

import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from dpo.data.pairs import ImageRef
from dpo.labelling import summary
from dpo.labelling.items import Item
from tests.help.pages import Page

NAN = float("nan")


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def made(**changes):
    apart = np.array([0.5, -2.0, 0.01, 1.0, NAN, -0.3])
    fields = {
        "scorers": [
            {"name": "a", "weight": 1.0, "sign": 1.0, "fingerprint": "a 1", "asked": "a", "mean": 0.0, "spread": 1.0}
        ],
        "rows": 6,
        "apart": apart,
        "label_0": np.array([1, 0, 0.5, 1, NAN, 0]),
        "p": 1 / (1 + np.exp(-apart)),
        "old": np.array([1, 1, 1, NAN, 1, 0.2]),
        "captions": np.array([1, 1, 2, 3, 3, 4]),
        "temperature": 1.0,
        "own_temperature": None,
        "margin": 0.05,
        "fitting": None,
        "item": lambda row, side: Item(f"caption {row}", ImageRef("", data=picture(40 * row + 10 * side))),
    }
    return summary.Made(**fields | changes)


def test_the_figures():
    found = made().figures()
    assert (found["rows"], found["pairs"], found["without_a_score"], found["ties"]) == (6, 5, 1, 1)
    assert found["captions"] == 4 and found["first_preferred"] == 2 and found["labels"] == "soft"
    assert found["agreement_with_old_labels"]["pairs"] == 3
    assert found["agreement_with_old_labels"]["share"] == pytest.approx(2 / 3)
    assert found["mean_p_of_preferred"] == pytest.approx(
        np.mean([1 / (1 + np.exp(-abs(d))) for d in (0.5, 2, 0.01, 1, 0.3)])
    )
    json.dumps(found, allow_nan=False)


def test_the_surest_and_the_least_sure_pairs_have_different_captions():
    assert made().extremes(True) == [1, 3, 5, 2], "of caption 1 its surest"
    assert made().extremes(False) == [2, 5, 0, 3]


@pytest.mark.long
def test_the_files(tmp_path):
    summary.write(tmp_path, made())
    assert {path.name for path in tmp_path.iterdir()} == set(summary.FILES)
    page = Page((tmp_path / "pairs.html").read_text("utf-8"))
    assert (
        "The surest pairs" in page.text and "caption 1" in page.text and "a tie; difference 0.01, p 0.502" in page.text
    )
    assert page.tags.count("img") == 2 * 8 and all(ref.startswith("data:") for ref in page.refs)
    with Image.open(tmp_path / "margins.png") as image:
        assert image.width > 400 and image.getcolors(1 << 20) is not None
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    summary.write(tmp_path, made())
    assert again == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_sentences_of_hard_labels_say_no_probability():
    hard = summary.lines(made(temperature=None))
    assert not any("sigmoid" in line for line in hard) and "Agreement with the old labels: 0.667" in hard[1]
    assert len(summary.lines(made(old=np.full(6, NAN), temperature=None))) == 1
    fit = {"temperature": 1.0, "pairs": 30, "held_out": 20, "before": -0.6, "after": -0.5, "sure": -0.55}
    assert "-0.6000 before, -0.5000 after" in summary.lines(made(fitting=fit))[-1]


@pytest.mark.parametrize("layout", ["pickapic", "chosen-rejected"])
def test_the_head_of_the_readme_is_what_datasets_reads(tmp_path, layout):
    summary.write_readme(tmp_path / "README.md", made(), layout)
    head = yaml.safe_load((tmp_path / "README.md").read_text("utf-8").split("---")[1])
    assert head["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]

"""Pairs to look at: what a run would read, as images, and mistakes in one line."""

import pytest

from dpo.common.errors import UserError
from dpo.data.examples import open_pairs
from dpo.data.store import fill
from tests.help.stores import Synthetic, task
from tests.help.worlds import encode, make_folders, make_pairs, make_pickapic


def test_a_pair_is_a_prompt_two_images_and_a_probability(tmp_path):
    found = open_pairs(make_folders(tmp_path, 3), label_smoothing=0.1)
    prompt, chosen, rejected, p = found[-1]
    assert len(found) == len(list(found)) == 3 and prompt == make_pairs(3)[2]["caption"] and p == pytest.approx(0.9)
    assert chosen.mode == rejected.mode == "RGB" and chosen.size == (32, 32)
    red, blue = (image.resize((1, 1)).getpixel((0, 0)) for image in (chosen, rejected))
    assert red[0] > red[2] and blue[2] > blue[0], "the preferred image is the bright red one"
    with pytest.raises(IndexError):
        found[3]


def test_it_says_what_was_left_out(tmp_path):
    folder = make_pickapic(tmp_path, 4, ties=2)
    assert repr(open_pairs(folder)) == "Examples(6 rows: 4 pairs; left out: 2 ties)"
    assert len(open_pairs(folder, ties="keep")) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tie": "keep"}, "tie does not say how pairs are read; did you mean ties?"),
        ({"ties": "maybe"}, "ties = maybe: one of drop, keep"),
        ({"data": "nowhere"}, "no such file or folder"),
    ],
)
def test_mistakes(tmp_path, settings, message):
    with pytest.raises(UserError) as told:
        open_pairs(**{"data": make_folders(tmp_path, 1)} | settings)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_an_unreadable_image_is_named_and_a_store_has_none(tmp_path):
    found = open_pairs(make_folders(tmp_path / "pairs", 2))
    (tmp_path / "pairs" / "l" / "00001.jpg").write_bytes(encode(make_pairs(1)[0]["win"], "truncated"))
    found[0]
    with pytest.raises(UserError, match=r"00001\.jpg of 'a lamp at dawn, number 1'.*mend it or leave the pair out"):
        found[1]
    fill.fill(task(store := tmp_path / "store", Synthetic(2)))
    with pytest.raises(UserError, match="prepared store, which keeps no images"):
        open_pairs(store, resolution=8)

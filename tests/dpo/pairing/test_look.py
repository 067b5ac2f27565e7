"""What is in an image: upright sizes, pixels whatever the file, broken ones with their reason, each looked at once."""

import numpy as np
import pytest
from PIL import Image

from dpo.data.pairs import ImageRef
from dpo.data.sources import open_source
from dpo.pairing import look
from dpo.pairing.look import Broken, Looker, Seen, apart, chosen
from dpo.settings.config import Data
from tests.help.worlds import draw, encode, make_pickapic, make_table


def seen(data):
    return Looker().see(ImageRef("x", data=data))


def test_a_picture_is_known_by_its_pixels():
    image = draw(np.random.default_rng(0), True, (160, 96))
    png = seen(encode(image, "png"))
    assert (png.width, png.height) == (160, 96) and png.small.shape == (16, 16, 3)
    turned = seen(encode(image, "exif"))
    assert (turned.width, turned.height) == (160, 96), "as the EXIF tag says"
    jpeg = seen(encode(image))
    assert jpeg.pixels != png.pixels and apart(jpeg, png) < 3 < apart(
        png, seen(encode(draw(np.random.default_rng(1), True)))
    )


@pytest.mark.parametrize("kind", ["truncated", "corrupt", "empty", "bomb"])
def test_broken_files_have_a_reason(kind):
    found = seen(encode(Image.new("RGB", (32, 32)), kind))
    assert isinstance(found, Broken) and found.why and "\n" not in found.why


def test_equal_files_are_decoded_once(monkeypatch):
    times, data = [], encode(Image.new("RGB", (8, 8)))
    monkeypatch.setattr(look, "decode", lambda data, real=look.decode: (times.append(1), real(data))[1])
    looker = Looker()
    assert all(isinstance(one, Seen) for one in looker.all([ImageRef(str(i), data=data) for i in range(40)]))
    assert len(times) <= look.READERS


def test_pairs_of_any_source_and_a_keyed_part_of_a_large_one(tmp_path):
    for path in (make_table(tmp_path / "t", 5), make_pickapic(tmp_path / "p", 5)):
        source = open_source(Data(data=str(path)))
        found = look.look(source, chosen(source, 3), Looker())
        places = [one.place for one in found]
        assert len(places) == 3 and places == sorted(places) and places == chosen(source, 3).tolist()
        assert all(one.key == source[one.place].key and one.caption == source[one.place].caption for one in found)
        assert all(one.win.small.mean((0, 1))[0] > one.lose.small.mean((0, 1))[0] for one in found), "winners are red"
    assert chosen(source, 9).tolist() == [0, 1, 2, 3, 4]


def test_a_large_set_is_read_by_a_few_row_groups(tmp_path):
    source = open_source(Data(data=str(make_pickapic(tmp_path, 48, size=(8, 8), row_group_size=2))))
    found = chosen(source, 30)
    assert len(np.unique(source.groups[found])) <= look.UNITS and len(found) == 30 == len(set(found.tolist()))
    found = chosen(source, 47)
    assert len(np.unique(source.groups[found])) == look.UNITS and len(found) == 40, "fewer pairs than asked for"

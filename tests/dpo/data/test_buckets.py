"""Aspect buckets: the shapes, the one that a pair has, what is cut away, and micro-batches of one shape each."""

import io

import numpy as np
import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.data.buckets import Buckets, Cut, cut_away, find, measured, nearest, shapes, step_of
from dpo.data.images import MAX_MIB, fitted, upright_size
from dpo.data.order import Order, run_order, stored_order
from dpo.data.pairs import ImageRef
from dpo.settings.config import Data
from tests.help.stores import Synthetic
from tests.help.worlds import draw, encode

SD15 = ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
SDXL = (
    (704, 1408), (768, 1344), (768, 1280), (832, 1216), (896, 1152), (960, 1088), (1024, 1024),
    (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704),
)  # fmt: skip


@pytest.mark.parametrize(
    "resolution, factor, expected",
    [
        (512, 64, SD15),
        (1024, 32, SDXL),
        (32, 8, ((24, 40), (32, 32), (40, 24))),
        (64, 16, ((48, 80), (64, 64), (80, 48))),
    ],
)
def test_shapes(resolution, factor, expected):
    step = step_of(resolution, factor)
    assert shapes(resolution, step) == expected
    for high, wide in expected:
        assert not high % step and not wide % step and not high % factor
        assert high * wide <= resolution**2 and 0.5 <= wide / high <= 2
    assert all(high * wide / resolution**2 > 0.84 for high, wide in expected[1:-1])


def test_a_resolution_between_two_steps_is_refused():
    assert step_of(768, 64) == 64 and step_of(256, 8) == 32
    with pytest.raises(UserError, match="steps of 64 pixels: use --resolution 512"):
        step_of(520, 64)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((512, 512), (512, 512), (512, 512)),
        ((1024, 768), (1024, 768), (448, 576)),  # 4:3
        ((768, 1024), (768, 1024), (576, 448)),
        ((1536, 1024), (1536, 1024), (384, 640)),  # 3:2
        ((1920, 1080), (1920, 1080), (384, 640)),
        ((4000, 100), (4000, 100), (384, 640)),  # wider than any
        ((10, 1000), (10, 1000), (640, 384)),
        ((2000, 1000), (1000, 2000), (512, 512)),  # wide beside high: the geometric mean is 1
        ((1920, 1080), (512, 512), (448, 576)),  # sqrt(16 / 9) = 4 / 3
        ((9, 7), (7, 7), (512, 512)),  # just between: sqrt(9 / 7) is as far from 1 as from 9 / 7
        ((7, 7), (7, 9), (512, 512)),
        ((9 * 10**6 + 1, 7 * 10**6), (7, 7), (448, 576)),  # and a hair beyond it
        ((9, 7), (5, 3), (448, 576)),  # between 9 / 7 and 5 / 3
        ((3, 5), (7, 9), (576, 448)),
        (None, (1920, 1080), (512, 512)),  # unreadable: a hole wherever it is
    ],
)
def test_nearest(first, second, expected):
    for pair in ((first, second), (second, first)):
        assert SD15[nearest(SD15, *pair)] == expected


def test_cut_away():
    assert cut_away((1536, 1024), (512, 512)) == pytest.approx(1 / 3)
    assert cut_away((1536, 1024), (384, 640)) == pytest.approx(1 - 1.5 / (640 / 384))
    assert cut_away((640, 384), (384, 640)) == 0 and cut_away((384, 640), (512, 512)) == pytest.approx(0.4)
    cut = Cut()
    for image in ((640, 384), (512, 512)):
        cut.add(image, (384, 640))
    assert cut.told() == "20.0 % of the images' area is cut away, 20.0 % by squares"


@pytest.mark.parametrize("kind", ["jpeg", "png", "palette-alpha", "exif", "sixteen"])
def test_the_header_tells_the_size_as_shown(kind):
    image = draw(np.random.default_rng(0), True, (40, 24))
    assert upright_size(ImageRef("a", encode(image, kind))) == (40, 24)


def test_a_header_is_read_however_far_back_it_lies(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(buffer, "TIFF")  # its directory may come last
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 8, "x" * 60000
    for name, data in {
        "tiff": buffer.getvalue(), "long": encode(draw(np.random.default_rng(0), True, (300, 200))), "no": b"no image", "": b"",
    }.items():  # fmt: skip
        (tmp_path / f"a{name}").write_bytes(data)
        found = upright_size(ImageRef("a", path=str(tmp_path / f"a{name}")))
        assert found == ((300, 200) if name in ("tiff", "long") else None)
    Image.new("RGB", (300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    assert upright_size(ImageRef("a", path=str(tmp_path / "turned.jpg"))) == (200, 300)
    assert upright_size(ImageRef("a", path=str(tmp_path / "missing"))) is None
    tar = b"0" * 100 + (tmp_path / "along").read_bytes() + b"0" * 100
    (tmp_path / "tar").write_bytes(tar)
    assert upright_size(ImageRef("a", path=str(tmp_path / "tar"), span=(100, len(tar) - 200))) == (300, 200)


def test_the_smallest_that_covers_the_shape_is_cut():
    """A ramp from left to right of 80 x 40 in 32 x 24: shown are the middle 53 of its columns."""
    ramp = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[:, None] * 3, (40, 1, 3)).reshape(40, 80, 3))
    buffer = io.BytesIO()
    ramp.save(buffer, "PNG")
    pixels, micro = fitted(buffer.getvalue(), (24, 32))
    assert pixels.shape == (3, 24, 32) and micro == (40, 80, 0, 8, 24, 32)
    assert abs(int(pixels[0, 0, 0]) - 3 * 80 * 8 / 48) < 6 and abs(int(pixels[0, 0, -1]) - 3 * 80 * 40 / 48) < 6
    _, micro = fitted(buffer.getvalue(), (32, 24), "random", (0.0, 0.999), flip=True)
    assert micro == (40, 80, 0, 40, 32, 24)


def table(n: int, kinds: int = 3) -> Buckets:
    return Buckets(((24, 40), (32, 32), (40, 24))[:kinds], np.arange(n) * 7 % kinds)


@pytest.mark.parametrize("micro_batch, world", [(1, 1), (4, 1), (2, 2), (3, 1), (2, 3)])
def test_an_update_has_the_pairs_that_it_has_without_buckets(micro_batch, world):
    """Each once, sorted into micro-batches of one shape and one length; every process makes as many passes."""
    source, buckets, update = Synthetic(31), table(31), 12
    plain = list(run_order(source, Order(5, 24, 12, 24 + 4 * update, update=update)))
    assert all(place.last and place.pairs == 12 and place.size is None for place in plain)
    seen = [
        list(run_order(source, Order(5, 24, micro_batch, 24 + 4 * update, rank, world, update, buckets)))
        for rank in range(world)
    ]
    ends = [[i for i, place in enumerate(places) if place.last] for places in seen]
    assert all(end == ends[0] for end in ends) and len(ends[0]) == 4
    begin = 0
    for number, end in enumerate(ends[0]):
        mine = [place for places in seen for place in places[begin : end + 1]]
        pairs = [p for place in mine for p in zip(place.indices[: place.pairs], place.epochs, strict=False)]
        assert sorted(pairs) == sorted(zip(plain[number].indices, plain[number].epochs, strict=True))
        for place in mine:
            assert len(place.indices) == len(place.epochs) == micro_batch
            assert {buckets.sizes[buckets.of[i]] for i in place.indices} == {place.size}
        if micro_batch == 1 and world == 1:
            assert all(place.pairs == 1 for place in mine)
        begin = end + 1


def test_held_out_pairs_come_by_shape_and_each_once():
    source, buckets = Synthetic(10), table(10)
    places = list(stored_order(source, 3, buckets=buckets))
    assert [place.indices for place in places] == [[0, 3, 6], [9], [1, 4, 7], [2, 5, 8]]
    assert sorted(i for place in places for i in place.indices) == list(range(10))
    assert all(place.pairs == len(place.indices) for place in places)
    assert len({place.position for place in places}) == len(places)
    shares = [list(stored_order(source, 3, rank, 2, buckets)) for rank in (0, 1)]
    assert [place for each in zip(*shares, strict=True) for place in each][: len(places)] == places


def test_buckets_are_measured_from_the_headers():
    class Wide(Synthetic):
        def __getitem__(self, index):
            pair = super().__getitem__(index)
            buffer = io.BytesIO()
            Image.new("RGB", (50, 30)).save(buffer, "PNG")
            return (
                pair
                if index % 2
                else type(pair)(
                    pair.key, pair.caption, ImageRef("w", buffer.getvalue()), ImageRef("l", buffer.getvalue()), 1.0
                )
            )

    source = Wide(6, broken=(3,))
    found = measured(source, ((24, 40), (32, 32), (40, 24)), MAX_MIB)
    assert found.of.tolist() == [0, 1, 0, 1, 0, 1] and found.cut.images == 11
    assert "32 x 32 3, 40 x 24 3" in found.told() and "0.0 % of the images' area is cut away" in found.told()
    assert found.cut.by_squares == pytest.approx(6 * 0.4)
    assert find(Data(resolution=32), 8, source) is None
    assert find(Data(resolution=32, buckets=True), 8, source).of.tolist() == found.of.tolist()

"""Images as raters see them: one size, uncut, and not a word beside the pixels."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.data.images import decode
from dpo.voting.shown import LONGEST, SURROUND, Gallery, code, encoded, fitted, size_for
from tests.help.votes import make_study


def chunks(data):
    """The names of a PNG's chunks."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, names = 8, []
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        names.append(name.decode())
        place += 12 + length
    return names


@pytest.mark.parametrize(
    ("one", "other", "size"),
    [
        ((512, 512), (512, 512), (512, 512)),
        ((512, 512), (1024, 1024), (1024, 1024)),
        ((640, 480), (480, 640), (640, 640)),
        ((4000, 2000), (100, 3000), (LONGEST, LONGEST * 3 // 4)),
        ((100_000, 1), (1, 1), (LONGEST, 1)),
    ],
)
def test_both_are_shown_in_one_size(one, other, size):
    assert size_for(one, other) == size_for(other, one) == size


@pytest.mark.parametrize(
    ("size", "target"), [((60, 40), (60, 60)), ((20, 30), (60, 60)), ((200, 100), (60, 60)), ((1, 900), (60, 60))]
)
def test_an_image_is_fitted_and_never_cropped(size, target):
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, :, 2] = 255
    pixels[0], pixels[-1] = (255, 0, 0), (255, 0, 0)  # its first and last row
    shown = fitted(Image.fromarray(pixels), target)
    assert shown.size == target
    found = np.asarray(shown).astype(int)
    inside = np.argwhere((found != SURROUND).any(axis=2))
    top, left = inside.min(axis=0)
    bottom, right = inside.max(axis=0)
    width, height = right - left + 1, bottom - top + 1
    assert width == target[0] or height == target[1]
    scale = min(target[0] / size[0], target[1] / size[1])
    assert abs(width - size[0] * scale) <= 1 and abs(height - size[1] * scale) <= 1
    middle = found[:, (left + right) // 2]
    if size[1] < 100:
        assert middle[top][0] > middle[top][2] and middle[bottom][0] > middle[bottom][2]  # both edges are there


def test_nothing_is_beside_the_pixels(tmp_path):
    study = make_study(tmp_path / "study", 2)
    gallery = Gallery(tmp_path / "study")
    item = study.items[0]
    original = (tmp_path / "basemodel" / "0.png").read_bytes()
    assert b"basemodel" in original and "tEXt" in chunks(original)
    for which in (0, 1):
        data = gallery.png(item, which)
        assert set(chunks(data)) == {"IHDR", "IDAT", "IEND"} and b"model" not in data
        with Image.open(io.BytesIO(data)) as image:
            assert image.tobytes() == decode((tmp_path / "study" / item.images[which]).read_bytes()).tobytes()
            assert image.info == {}


def test_what_an_image_carries_along_is_not_encoded():
    image = Image.new("RGB", (4, 4), "red")
    image.info.update(dpi=(72, 72), icc_profile=b"secret", transparency=(0, 0, 0), comment="secret")
    assert set(chunks(encoded(image))) == {"IHDR", "IDAT", "IEND"}


def test_a_changed_or_missing_image_is_not_shown(tmp_path):
    study = make_study(tmp_path / "study", 2)
    item = study.items[0]
    Image.new("RGB", (48, 48), "blue").save(item.images[1])
    with pytest.raises(UserError, match=r"0\.png was changed since the study was declared"):
        Gallery(tmp_path / "study").png(item, 0)
    (tmp_path / "newmodel" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: .*put the image back"):
        Gallery(tmp_path / "study").png(item, 1)


def test_memory_is_bounded_and_what_was_used_last_stays(tmp_path):
    study = make_study(tmp_path / "study", 6)
    size = len(Gallery(tmp_path / "study").png(study.items[0], 0))
    gallery = Gallery(tmp_path / "study", bound=6 * size)
    for item in study.items[:6]:
        gallery.png(item, 0)
        assert gallery._held == sum(map(len, gallery._kept.values())) <= 6 * size
    (tmp_path / "newmodel" / "5.png").unlink()
    assert gallery.png(study.items[5], 1)  # from memory
    (tmp_path / "newmodel" / "0.png").unlink()
    with pytest.raises(UserError):  # long gone
        gallery.png(study.items[0], 1)


def test_an_address_is_another_one_for_each_rater_item_and_side():
    codes = {
        code(key, rater, item, which) for key in (b"1", b"2") for rater in "AB" for item in "ij" for which in (0, 1)
    }
    assert len(codes) == 16

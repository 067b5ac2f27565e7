"""Every kind of image file becomes upright RGB pixels of the wanted size, or a BadImage that says why not."""

import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dpo.data import images
from dpo.data.images import decode, fitted
from dpo.data.pairs import BadImage, ImageRef
from tests.help import worlds


def picture(width=48, height=32, seed=0):
    return worlds.draw(np.random.default_rng(seed), True, (width, height))


def gradient(width, height):
    """Red grows to the right, green grows downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", worlds.ODDITIES)
def test_every_kind_of_file_shows_the_same_picture(kind):
    image = picture()
    pixels, micro = fitted(worlds.encode(image.copy(), kind), (32, 32))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
    assert micro == (32, 48, 0, 8, 32, 32)
    wanted = np.asarray(image.crop((8, 0, 40, 32)).convert("L"), dtype=float)
    seen = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"), dtype=float)
    if kind in ("alpha", "gray-alpha", "palette-alpha", "one-bit"):
        assert abs(wanted.mean() - seen.mean()) < 80  # over white, or two colours
    else:
        assert np.abs(wanted - seen).mean() < 12


def test_alpha_lies_over_white():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 16, 32))
    pixels, _ = fitted(png(image), (32, 32))
    assert (pixels[:, :, 16:] == 255).all()
    assert pixels[:, 5, 5].tolist() == [10, 20, 30]


def test_palette_transparency_lies_over_white_even_when_turned():
    image = Image.new("P", (32, 16), 1)
    image.putpalette([0, 0, 0, 200, 30, 40])
    image.paste(0, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(png(image, transparency=0, exif=exif))
    assert decoded.size == (16, 32)
    assert decoded.getpixel((8, 4)) == (255, 255, 255)
    assert decoded.getpixel((8, 28)) == (200, 30, 40)


def test_sixteen_bit_grey_keeps_its_shades():
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    pixels, _ = fitted(png(Image.fromarray(values)), (32, 32))
    assert torch.equal(pixels[0], torch.from_numpy(np.rint(values / 257.0).astype(np.uint8)))


def test_wide_integers_and_floats():
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 32768, dtype=np.int32)).save(buffer, "TIFF")
    assert decode(buffer.getvalue()).getpixel((0, 0)) == (128, 128, 128)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(buffer, "TIFF")
    assert decode(buffer.getvalue()).getpixel((0, 0)) in {(127, 127, 127), (128, 128, 128)}


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation(tag):
    upright = gradient(40, 24)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes what the tag asks for
    stored = upright if tag == 1 else upright.transpose(Image.Transpose(undo[tag]))
    exif = Image.Exif()
    exif[0x0112] = tag
    decoded = decode(png(stored, exif=exif))
    assert decoded.size == (40, 24)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


def test_malformed_exif_is_no_reason_to_lose_an_image():
    buffer = io.BytesIO()
    gradient(32, 32).save(buffer, "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert decode(buffer.getvalue()).size == (32, 32)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("truncated", "truncated|Truncated"), ("corrupt", "not an image"), ("bomb", "pixels"), ("empty", "empty file")],
)
def test_bad_images_say_why(kind, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=reason):
            fitted(worlds.encode(picture(), kind), (32, 32))


def test_a_limit_on_pixels_is_checked_before_decoding():
    with pytest.raises(BadImage, match="48 x 32 pixels, more than 1000"):
        fitted(worlds.encode(picture()), (32, 32), max_pixels=1000)


def test_truncated_images_are_never_loaded_in_part():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    data = worlds.encode(picture(256, 256), "png")
    for end in range(100, len(data) - 20, len(data) // 7):
        with pytest.raises(BadImage):
            fitted(data[:end], (32, 32))


@pytest.mark.parametrize("size", [(64, 32), (33, 71), (32, 32), (20, 90), (17, 16), (640, 480)])
def test_cutting_while_resizing_equals_resizing_then_cutting(size):
    image = gradient(*size)
    for crop, uniforms in (("center", (0.5, 0.5)), ("random", (0.13, 0.81))):
        pixels, (high, wide, top, left, *_) = fitted(png(image), (32, 32), crop, uniforms)
        assert (wide, high) == size
        scale = 32 / min(size)
        whole = image.resize((max(32, round(wide * scale)), max(32, round(high * scale))), Image.Resampling.LANCZOS)
        wanted = np.asarray(whole.crop((left, top, left + 32, top + 32)), dtype=int)
        assert np.abs(wanted - pixels.permute(1, 2, 0).numpy()).max() <= 1


def test_a_very_long_image_costs_no_more():
    pixels, micro = fitted(png(gradient(20000, 2)), (256, 256))
    assert pixels.shape == (3, 256, 256) and micro[3] > 1_000_000


def test_random_crops_reach_both_ends_and_stay_inside():
    for uniform, left in ((0.0, 0), (0.999999, 32)):
        _, micro = fitted(png(gradient(64, 32)), (32, 32), "random", (0.5, uniform))
        assert micro[2:4] == (0, left)


def test_flip_mirrors_before_the_crop():
    image = gradient(64, 32)
    plain, _ = fitted(png(image), (32, 32), "random", (0.0, 0.0), flip=False)
    flipped, micro = fitted(png(image), (32, 32), "random", (0.0, 0.0), flip=True)
    other_end, _ = fitted(png(image), (32, 32), "random", (0.0, 0.999), flip=False)
    assert micro[3] == 0
    assert torch.equal(flipped, other_end.flip(-1))
    assert not torch.equal(flipped, plain)


def test_small_images_grow():
    pixels, micro = fitted(png(gradient(7, 5)), (64, 64))
    assert pixels.shape == (3, 64, 64) and micro[:2] == (5, 7)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX", "TGA", "ICNS", "PDF"])
def test_other_formats_are_no_images_whatever_their_name(kind, tmp_path, monkeypatch):
    def program(*args, **kwargs):
        raise AssertionError("a file started a program")

    monkeypatch.setattr(subprocess, "Popen", program)
    path = tmp_path / "innocent.jpg"
    picture(64, 64).save(path, kind)
    with pytest.raises(BadImage, match="not an image"):
        decode(ImageRef("", path=str(path)).load())


def test_the_formats_are_those_that_folders_are_searched_for():
    known = {Image.registered_extensions()[suffix] for suffix in images_of_folders()}
    assert set(images.formats()) == known - {"MPO"}


def images_of_folders():
    from dpo.data.folders import extensions

    return extensions()


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(BadImage, match="not a regular file"):
            ImageRef("", path=str(path)).load()


def test_a_file_larger_than_the_limit_is_not_read(tmp_path):
    path = tmp_path / "large.jpg"
    with open(path, "wb") as file:
        file.truncate((256 << 20) + 1)  # takes no space
    for image in (ImageRef("", path=str(path)), ImageRef("", path=str(path), span=(0, (256 << 20) + 1))):
        with pytest.raises(BadImage, match="a file of 256 MiB, more than --max-image-mib 256"):
            image.load()
    for image in (ImageRef("", data=bytes((1 << 20) + 1)), ImageRef("", path=str(path), span=(0, (1 << 20) + 1))):
        with pytest.raises(BadImage, match="--max-image-mib 1"):
            image.load(max_mib=1)
    assert ImageRef("", path=str(path), span=(5, 7)).load(max_mib=1) == bytes(7)


@pytest.mark.parametrize("kind", ["alpha", "gray-alpha", "palette-alpha", "sixteen-bit"])
def test_bands_give_what_the_whole_gives(kind, monkeypatch):
    data = worlds.encode(picture(47, 33), kind) if kind != "sixteen-bit" else png(sixteen_bit())
    whole = np.asarray(decode(data))
    monkeypatch.setattr(images, "BAND", 100)
    assert np.array_equal(np.asarray(decode(data)), whole)


def sixteen_bit():
    values = np.random.default_rng(0).integers(0, 65536, (33, 47))
    return Image.fromarray(values.astype(np.uint16))


def test_colours_are_converted_without_whole_copies_in_wide_modes(monkeypatch):
    largest = []
    monkeypatch.setattr(images, "BAND", 1000)
    monkeypatch.setattr(images, "_values", lambda band, of=images._values: largest.append(band.size) or of(band))
    decode(png(sixteen_bit()))
    assert largest and max(width * height for width, height in largest) <= 1000

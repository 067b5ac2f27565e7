"""dpo.data.store.appended: a source that shares names and captions with a store has the same images, or is refused."""

import shutil

import pytest

from dpo.common.errors import UserError
from dpo.data.folders import open_folders
from dpo.data.labels import UNREADABLE
from dpo.data.store import fill
from dpo.data.store.store import merge, read_contents
from dpo.settings.config import Data
from tests.help.stores import SETTINGS, Encoders, png, task
from tests.help.worlds import make_folders

SHAPED = {"settings": SETTINGS | {"buckets": 1, "vae_scale": 1}}


class Shapes(Encoders):
    """Latents [N, 4, H, W]."""

    def images(self, pixels):
        self.calls["images"] += len(pixels)
        mean = pixels[:, :1].to(self.dtype).expand(-1, 4, -1, -1).contiguous()
        return mean, mean / 2


def add(store, folder, **changes):
    """How many images were encoded to bring the pairs of a folder into a store."""
    encode = Shapes() if "settings" in changes else Encoders()
    assert fill.fill(task(store, open_folders(folder, Data()), encode, **{"name": folder.name} | changes))
    return encode.calls["images"]


@pytest.fixture
def rounds(tmp_path):
    """Six pairs, and seven of which six have their names and captions, in another folder."""
    return make_folders(tmp_path / "one", 6), make_folders(tmp_path / "two", 7)


@pytest.mark.parametrize("changes", [{}, SHAPED], ids=["squares", "shapes"])
def test_images_of_another_folder_are_not_taken_for_those_of_the_same_names(tmp_path, rounds, changes):
    one, two = rounds
    add(tmp_path / "store", one, **changes)
    before = (tmp_path / "store" / "store.json").read_bytes()
    encode = Encoders()
    with pytest.raises(
        UserError, match="^.*store holds 6 of the pairs of two by .* lay elsewhere: .*--merge.* move it"
    ):
        fill.fill(task(tmp_path / "store", open_folders(two, Data()), encode, **changes | {"name": "two"}))
    assert not encode.calls["images"] and (tmp_path / "store" / "store.json").read_bytes() == before
    add(tmp_path / "other", two, **changes)  # as the message says
    merge(tmp_path / "both", [tmp_path / "store", tmp_path / "other"])
    contents = read_contents(tmp_path / "both")
    assert len(contents.order) == 13 and len({*contents.win.tolist(), *contents.lose.tolist()}) == 26


@pytest.mark.parametrize("changes", [{}, SHAPED], ids=["squares", "shapes"])
def test_a_folder_that_grew_is_appended_with_its_shapes_and_holes(tmp_path, rounds, changes):
    one, two = rounds
    for folder in rounds:
        (folder / "w" / "00001.jpg").write_bytes(b"broken")
        (folder / "l" / "00002.jpg").write_bytes(png(50, (20, 8)))
        (folder / "l" / "00003.jpg").write_bytes(png(60, (8, 20)))
    add(tmp_path / "store", one, **changes)
    for name in ("w/00006.jpg", "l/00006.jpg", "metadata.jsonl"):
        shutil.copy(two / name, one / name)
    assert add(tmp_path / "store", one, **changes) == 2
    contents = read_contents(tmp_path / "store")
    assert len(contents.order) == 7 and contents.summary[UNREADABLE] == 1


def take(source, folder, *numbers):
    """Copies pairs of one folder into another, without their captions."""
    for number in numbers:
        for side in "wl":
            shutil.copy(source / side / f"{number:05d}.jpg", folder / side)


def redraw(folder, number):
    (folder / "w" / f"{number:05d}.jpg").write_bytes(png(7))


@pytest.fixture
def growing(tmp_path):
    """Ten pairs to take from, and a folder of the first four that has the captions of all."""
    pool, folder = make_folders(tmp_path / "pool", 10), make_folders(tmp_path / "set", 4)
    shutil.copy(pool / "metadata.jsonl", folder)
    return pool, folder


@pytest.mark.parametrize("redrawn", [1, 5])
def test_a_folder_that_grew_and_was_redrawn_is_refused(tmp_path, growing, redrawn, caplog):
    """Whether the image is of the first source or of the second, whose first four pairs are the first's."""
    (pool, folder), store = growing, tmp_path / "store"
    (folder / "l" / "00002.jpg").write_bytes(b"broken")
    add(store, folder)
    for more in ((4, 5), (6, 7)):  # it may grow
        take(pool, folder, *more)
        assert add(store, folder) == 4
    take(pool, folder, 2)  # and be mended
    assert add(store, folder) == 1
    take(pool, folder, 8)
    redraw(folder, redrawn)
    with pytest.raises(UserError, match="store was prepared from other image files than set has now under the same"):
        add(store, folder)
    take(pool, folder, redrawn)
    assert add(store, folder) == 2
    assert not [record for record in caplog.records if "cannot be told" in record.message]


def test_pairs_that_cannot_be_compared_are_said(tmp_path, growing, caplog):
    (pool, folder), store = growing, tmp_path / "store"
    add(store, folder)
    take(pool, folder, 4)
    (folder / "w" / "00000.jpg").unlink()
    redraw(folder, 1)
    assert add(store, folder) == 2
    assert "store: 3 pairs of set count as stored, and whether their image files changed cannot be told" in caplog.text


def test_parts_compare_what_is_in_their_share_again(tmp_path, growing, caplog):
    """Of four pairs in two parts, then six: the first part's are all in its share again, and one of the second's two."""
    (pool, folder), parts = growing, [tmp_path / "part-0", tmp_path / "part-1"]
    for i, part in enumerate(parts):
        add(part, folder, first=2 * i, last=2 * i + 2)
    take(pool, folder, 4, 5)
    redraw(folder, 1)
    with pytest.raises(UserError, match="part-0 was prepared from other image files"):
        add(parts[0], folder, first=0, last=3)
    take(pool, folder, 1)
    add(parts[0], folder, first=0, last=3)
    assert "cannot be told" not in caplog.text
    add(parts[1], folder, first=3, last=6)
    assert "part-1: 1 pair of set count as stored" in caplog.text

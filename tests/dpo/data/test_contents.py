"""dpo.data.contents: image files that were changed in place, copied, touched, lost or are none."""

import os
import shutil
import weakref

import pytest

from dpo.data import contents
from dpo.data.contents import stamps
from dpo.data.folders import open_folders
from dpo.settings.config import Data
from tests.help.stores import Synthetic
from tests.help.worlds import make_folders


@pytest.fixture
def pairs(tmp_path):
    return make_folders(tmp_path / "pairs", 6)


def of(folder):
    return stamps(open_folders(folder, Data()))


def first(folder):
    return sorted(path for path in (folder / "w").iterdir() if path.suffix == ".jpg" or path.suffix == ".png")[0]


def test_untouched_files_are_the_same(pairs):
    assert of(pairs) == of(pairs) and of(pairs).keys() == {"images", "image_times"}


def test_a_copy_has_other_times_and_the_same_contents(pairs, tmp_path):
    before = of(pairs)
    shutil.copytree(pairs, tmp_path / "copy", copy_function=shutil.copy)
    for path in (tmp_path / "copy").rglob("*.*"):
        os.utime(path, (1, 1))
    after = of(tmp_path / "copy")
    assert after["images"] == before["images"] and after["image_times"] != before["image_times"]


@pytest.mark.parametrize("change", ["swapped", "one byte", "lost"])
def test_changed_in_place(pairs, change):
    before, image = of(pairs), first(pairs)
    if change == "swapped":
        other = pairs / "l" / image.name
        data = other.read_bytes(), image.read_bytes()
        image.write_bytes(data[0]), other.write_bytes(data[1])
    elif change == "one byte":
        data = bytearray(image.read_bytes())
        data[-3] ^= 1
        image.write_bytes(bytes(data))
    else:
        source = open_folders(pairs, Data())
        image.unlink()
        assert stamps(source)["images"] != before["images"]
        return
    assert of(pairs)["images"] != before["images"]


def test_a_pipe_is_not_waited_for(pairs):
    source, image = open_folders(pairs, Data()), first(pairs)
    image.unlink()
    os.mkfifo(image)
    assert stamps(source).keys() == {"images", "image_times"}


def test_of_a_large_set_few_images_are_in_memory_at_once(monkeypatch):
    class Watched(Synthetic):
        made = gone = most = 0

        def __getitem__(self, index):
            pair = super().__getitem__(index)
            for image in pair.images:
                self.made += 1
                weakref.finalize(image, self.count)
            self.most = max(self.most, self.made - self.gone)
            return pair

        def count(self):
            self.gone += 1

    whole = stamps(Watched(500))
    monkeypatch.setattr(contents, "AT_ONCE", 16)
    source = Watched(500)
    assert stamps(source) == whole and source.made >= 1000 and source.most < 150

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

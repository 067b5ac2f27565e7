"""dpo.data.store.parts: pairs that several parts of a store hold, with one label and with different ones."""

from dataclasses import replace

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.data.store import fill
from dpo.data.store.store import merge, read_contents
from tests.help.stores import SETTINGS, Encoders, Synthetic


def part(folder, source, name="set", **others):
    return fill.Filling(
        folder=folder, name=name, source=source, settings=SETTINGS, encode=Encoders(), pairs_per_shard=4, **others
    )


@pytest.fixture
def parts(tmp_path):
    """Pairs 0 to 9 in two parts, and a function that prepares another set into them."""
    folders = [tmp_path / "part-0", tmp_path / "part-1"]

    def prepare(source, name="set", **others):
        for i, folder in enumerate(folders):
            middle = (0, len(source) // 2, len(source))
            fill.fill(part(folder, source, name, first=middle[i], last=middle[i + 1], **others))

    prepare(Synthetic(10), "old")
    return folders, prepare


def test_a_pair_with_another_label_in_another_part_is_refused(tmp_path, parts):
    folders, prepare = parts
    prepare(Synthetic(20, ties=(7,)), "new")  # pair 7 is in part 0 now, and was in part 1
    with pytest.raises(UserError, match="new has pairs of old with another label: prepare one of them into another"):
        merge(tmp_path, folders)
    assert not (tmp_path / "store.json").exists()


def test_pairs_of_several_sets_with_one_label_are_counted(tmp_path, parts, caplog):
    folders, prepare = parts
    prepare(Synthetic(20), "new")
    merge(tmp_path, folders)
    assert f"{tmp_path}: 5 pairs of one set are in another one too, and count twice" in caplog.text
    assert len(read_contents(tmp_path).order) == 25


def test_one_set_may_have_a_pair_with_several_labels(tmp_path, caplog):
    """As votes have it, wherever the set is cut."""

    class Voted(Synthetic):
        def __getitem__(self, index):
            return replace(super().__getitem__(index % 5), prob=float(self.prob[index]))

    source = Voted(10, ties=(6,))
    folders = [tmp_path / "part-0", tmp_path / "part-1"]
    for i, folder in enumerate(folders):
        fill.fill(part(folder, source, first=5 * i, last=5 * i + 5))
    merge(tmp_path, folders)
    assert not caplog.records
    contents = read_contents(tmp_path)
    assert len(np.unique(contents.key)) == 5 and sorted(contents.prob[contents.key == contents.key[1]]) == [0.5, 1.0]


def test_labels_of_the_parts_beside_are_looked_at_before_anything_is_encoded(parts):
    folders, _ = parts
    source = Synthetic(20, ties=(7,))
    first = part(folders[0], source, "new", first=0, last=10, beside=folders[1:])
    with pytest.raises(UserError, match="holds 1 of the pairs of new with another label"):
        fill.fill(first)
    assert not first.encode.calls["images"]
    alike = replace(first, source=Synthetic(20))
    assert fill.fill(alike)
    second = part(folders[1], alike.source, "new", first=10, last=20, beside=folders[:1])
    assert fill.fill(second)  # what the first part has of the same set is no other label

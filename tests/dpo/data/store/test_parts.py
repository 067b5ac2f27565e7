"""dpo.data.store.parts: pairs that several parts hold, with one label and with different ones; where their index may be."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.data.store import fill
from dpo.data.store.filling import Filling
from dpo.data.store.store import merge, read_contents
from tests.help.stores import SETTINGS, Encoders, Synthetic


def part(folder, source, name="set", settings=SETTINGS, **others):
    return Filling(
        folder=folder, name=name, source=source, settings=settings, encode=Encoders(), pairs_per_shard=4, **others
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


# --- where an index over parts may be


def index_of(folder):
    return (folder / "store.json").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_an_ordinary_store_is_never_replaced_by_an_index_over_parts(tmp_path, finished):
    def stop(done, total):
        raise KeyboardInterrupt

    fill.fill(part(tmp_path / "b", Synthetic(5, start=50)))
    ours = part(tmp_path / "a", Synthetic(10), **({} if finished else {"progress": stop}))
    with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        fill.fill(ours)
    before = index_of(tmp_path / "a")
    for named in (["b"], ["a", "b"]):
        with pytest.raises(
            UserError, match="a is a prepared store of its own.*: name a new --store, and all stores after"
        ):
            merge(tmp_path / "a", [tmp_path / name for name in named])
        assert index_of(tmp_path / "a") == before


def test_a_merged_store_keeps_its_index_where_the_next_merge_is_refused(tmp_path):
    for name, source in (("a", Synthetic(5)), ("b", Synthetic(5, start=50))):
        fill.fill(part(tmp_path / name, source))
    fill.fill(part(tmp_path / "large", Synthetic(5, start=90), settings=SETTINGS | {"resolution": 16}))
    merge(tmp_path / "all", [tmp_path / "a", tmp_path / "b"])
    before = index_of(tmp_path / "all")
    for named, said in [
        (["a", "large"], "differ in resolution"),
        (["a", "b", "a"], "a is named twice after --merge"),
        (["a", "all"], "all is itself merged: name its parts"),
    ]:
        with pytest.raises(UserError, match=said):
            merge(tmp_path / "all", [tmp_path / name for name in named])
        assert index_of(tmp_path / "all") == before
    merge(tmp_path / "all", [tmp_path / "b", tmp_path / "a"])
    assert len(read_contents(tmp_path / "all").order) == 10

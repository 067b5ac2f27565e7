"""Folders of `save_to_disk`, and which types of columns hold images."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.common import files
from dpo.common.errors import UserError
from dpo.data.arrow import _lengths, check_schema
from dpo.data.labels import Columns
from dpo.data.sources import describe, open_source
from tests.dpo.data.test_parquet import is_bright
from tests.help import worlds


def rows_of(tmp_path, n=4, **options):
    return pq.read_table(worlds.make_chosen_rejected(tmp_path / "made", n, **options) / "train.parquet").to_pylist()


@pytest.mark.parametrize("images", ["dict", "raw", "path"])
def test_a_saved_set(images, tmp_path, settings):
    rows = rows_of(tmp_path, images=images)
    saved = worlds.make_saved(tmp_path / "saved", rows)
    if images == "path":
        (tmp_path / "made" / "images").rename(saved / "images")
    source = open_source(settings(saved))
    assert all(is_bright(source[i].win.load()) and not is_bright(source[i].lose.load()) for i in range(4))
    assert [source[i].caption for i in range(4)] == [row["prompt"] for row in rows]
    assert describe(source) == "4 rows: 4 pairs" and len(set(source.caption_keys().tolist())) == 4
    if images != "path":  # the same pairs as in parquet
        other = open_source(settings(tmp_path / "made"))
        assert [source[i].key for i in range(4)] == [other[i].key for i in range(4)]
        assert source.caption_keys().tolist() == other.caption_keys().tolist()


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_uids_may_be_numbers(kind, tmp_path, settings):
    """Their keys are those of the same numbers as text."""
    worlds.make_pickapic(tmp_path / "made", 3)
    rows = pq.read_table(next((tmp_path / "made").rglob("*.parquet"))).to_pylist()
    keys = []
    for form in (int, str):
        for i, row in enumerate(rows):
            row |= {"image_0_uid": form(2 * i), "image_1_uid": form(2 * i + 1), "created_at": None}
        if kind == "saved":
            place = worlds.make_saved(tmp_path / form.__name__, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), place := tmp_path / f"{form.__name__}.parquet")
        source = open_source(settings(place))
        keys.append([source[i].key for i in range(3)])
    assert keys[0] == keys[1] and sorted(image.uid for image in source[0].images) == ["0", "1"]


def test_what_is_left_out_of_a_saved_set(tmp_path, settings):
    worlds.make_pickapic(tmp_path / "made", 5, ties=2, unlabelled=1)
    rows = pq.read_table(next((tmp_path / "made").rglob("*.parquet"))).to_pylist()
    for row in rows:
        row["created_at"] = None
    source = open_source(settings(worlds.make_saved(tmp_path / "saved", rows)))
    assert describe(source) == "8 rows: 5 pairs; left out: 2 ties, 1 unlabelled"
    assert all(is_bright(source[i].win.load()) for i in range(5))


def test_one_image_twice_and_no_caption(tmp_path, settings):
    rows = rows_of(tmp_path)
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[1]["prompt"], rows[2]["prompt"] = None, ""
    source = open_source(settings(worlds.make_saved(tmp_path / "saved", rows)))
    assert describe(source) == "4 rows: 3 pairs, 2 without a caption; left out: 1 one image twice"
    assert source[0].caption == ""
    few = open_source(settings(tmp_path / "saved", max_pairs=2))
    assert few[1].key == source[1].key and few.fingerprint != source.fingerprint


def test_splits_of_a_saved_set(tmp_path, settings):
    worlds.make_saved(tmp_path / "saved", rows_of(tmp_path), split="valid")
    for split in ("valid", "validation"):
        assert len(open_source(settings(tmp_path / "saved"), split)) == 4
    with pytest.raises(UserError, match="saved: has no split 'train', found valid; choose one with --split"):
        open_source(settings(tmp_path / "saved"))


def test_the_fingerprint_is_of_the_content(tmp_path, settings):
    rows = rows_of(tmp_path)
    a, b, c = (
        open_source(settings(worlds.make_saved(tmp_path / name, part))).fingerprint
        for name, part in (("a", rows), ("b", rows), ("c", rows[1:]))
    )
    assert a == b != c


@pytest.mark.parametrize("change", ["cut", "overwritten", "replaced"])
def test_a_set_that_changes_while_it_is_read(change, tmp_path, settings, monkeypatch):
    """The files are mapped: where one is cut short, a read beyond its end kills the process."""
    monkeypatch.setattr(files, "LOOK", 0.0)
    saved = worlds.make_saved(tmp_path / "saved", rows_of(tmp_path))
    source = open_source(settings(saved))
    first = source[0].caption
    path = next(saved.glob("*.arrow"))
    if change == "replaced":  # what was mapped stays
        shutil.copyfile(path, saved / "new")
        (saved / "new").replace(path)
        assert source[0].caption == first
        return
    if change == "cut":
        os.truncate(path, 100)
    else:
        path.write_bytes(b"\xff" * (path.stat().st_size + 1))
    for read in (lambda: source[0], source.caption_keys):
        with pytest.raises(UserError, match=rf"{path.name} was changed while it was in use: .*--resume latest"):
            read()


def test_a_damaged_saved_set_is_one_line(tmp_path, settings):
    saved = worlds.make_saved(tmp_path / "saved", rows_of(tmp_path))
    next(saved.glob("*.arrow")).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"saved: cannot be read as a saved data set \(.*\); save it again") as caught:
        open_source(settings(saved))
    assert "\n" not in str(caught.value)


COLUMNS = Columns("prompt", "chosen", "rejected")


def schema(kind, text=None):
    text = pa.string() if text is None else text
    return pa.schema([("prompt", text), ("chosen", kind), ("rejected", kind)])


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.uint8())),
        pa.list_(pa.uint8(), 12),
        pa.large_list(pa.float32()),
        pa.list_(pa.struct([("bytes", pa.binary())])),
        pa.struct([("url", pa.string())]),
        pa.int64(),
    ],
)
def test_columns_that_hold_no_files_are_refused(kind):
    with pytest.raises(
        UserError, match=r"x: the images in chosen are .*, not files: give one image file a cell"
    ) as caught:
        check_schema(schema(kind), COLUMNS, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    ],
)
def test_columns_that_hold_files(kind):
    check_schema(schema(kind), COLUMNS, "x")
    with pytest.raises(UserError, match="the captions in prompt are list<item: string>, not text"):
        check_schema(schema(kind, pa.list_(pa.string())), COLUMNS, "x")


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([b"ab", None, b""], pa.binary_view()),
        pa.array(["ab", None, ""], pa.string_view()),
        pa.array(["ab", None, ""]).dictionary_encode(),
        pa.array([{"bytes": b"ab"}, {"bytes": None}, {"bytes": b""}], pa.struct([("bytes", pa.binary_view())])),
    ],
)
def test_lengths_of_cells(cells):
    assert _lengths(pa.chunked_array([cells])).tolist() == [2, -1, 0]

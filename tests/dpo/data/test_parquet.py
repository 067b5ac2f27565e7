"""Parquet: what is scanned, what is read, which rows are kept, and that memory stays flat."""

import base64
import io

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.data import parquet
from dpo.data.order import Order
from dpo.data.pairs import InMemory, pair_key
from dpo.data.sources import describe, open_source
from tests.help import worlds
from tests.help.reading import stream


def is_bright(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() > 100


@pytest.mark.parametrize("version", [1, 2])
def test_winners_win_and_every_drop_is_counted(version, tmp_path, settings):
    worlds.make_pickapic(
        tmp_path, 20, ties=5, unlabelled=3, soft=4, duplicates=2, version=version, shards=3, row_group_size=4
    )
    source = open_source(settings(tmp_path))
    assert len(source) == 26
    counts = {"rows": 34, "ties": 5, "unlabelled": 3, "invalid labels": 0, "one image twice": 0, "pairs": 26}
    counts["without a caption"] = 0
    assert source.summary == counts
    assert describe(source) == "34 rows: 26 pairs; left out: 5 ties, 3 unlabelled"
    pairs = [source[i] for i in range(26)]
    assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) for p in pairs)
    assert sorted(p.prob for p in pairs) == [0.75] * 4 + [1.0] * 22
    assert all(p.key == pair_key(p.win.uid, p.lose.uid, p.caption) for p in pairs)
    assert len({p.key for p in pairs}) == 24  # a pair judged twice has one key


def test_ties_kept_and_labels_smoothed(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 6, ties=2, soft=1)
    source = open_source(settings(tmp_path, ties="keep", label_smoothing=0.1))
    assert sorted(source[i].prob for i in range(9)) == pytest.approx([0.5] * 2 + [0.75] + [0.9] * 6)
    assert describe(source) == "9 rows: 9 pairs, 2 of them ties"
    few = open_source(settings(tmp_path, max_pairs=4))
    holes = InMemory([source[0]] * 90, np.ones(90), {"rows": 100, "pairs": 90, "with an unreadable image": 3}, "")
    assert (
        describe(holes) == "100 rows: 90 pairs; left out: 3 with an unreadable image, 10 by --max-pairs or as held out"
    )
    assert describe(few) == "9 rows: 4 pairs; left out: 2 ties, 3 by --max-pairs"


def test_key_does_not_depend_on_the_row_but_on_who_won(tmp_path, settings):
    worlds.make_pickapic(tmp_path / "a", 6, shards=1)
    worlds.make_pickapic(tmp_path / "b", 6, ties=2, shards=3)
    keys = []
    for name in "ab":
        source = open_source(settings(tmp_path / name))
        keys.append({pair.caption: pair.key for pair in (source[i] for i in range(6))})
    assert keys[0] == keys[1]
    assert pair_key("x", "y", "c") != pair_key("y", "x", "c") and -(2**63) <= pair_key("x", "y", "c") < 2**63


def test_scan_reads_no_image(tmp_path, settings, monkeypatch):
    worlds.make_pickapic(tmp_path, 8, row_group_size=2)
    read = []
    original = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, columns=None, **k: read.extend(columns) or original(self, columns, **k)
    )
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: pytest.fail("read a row group"))
    source = open_source(settings(tmp_path))
    assert len(source) == 8 and read and not set(read) & {"jpg_0", "jpg_1", "caption"}


def test_read_in_order_two_row_groups_stay_in_memory(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 12, row_group_size=2, shards=2)
    source = open_source(settings(tmp_path))
    ordered = parquet.read_in_order(source)
    assert [ordered[i].key for i in range(12)] == [source[i].key for i in range(12)]
    assert (len(ordered.cache), len(source.cache)) == (2, 6) and ordered.fingerprint == source.fingerprint
    assert parquet.read_in_order(InMemory([source[0]], np.ones(1), {}, "")).pairs == [source[0]]


def test_held_out_choice_reads_captions_only(tmp_path, settings, monkeypatch):
    worlds.make_pickapic(tmp_path, 8, row_group_size=3, captions=4)
    source = open_source(settings(tmp_path))
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, columns: (
            original(self, i, columns=columns) if columns == ["caption"] else pytest.fail("read images")
        ),
    )
    assert len(set(source.caption_keys().tolist())) == 4


@pytest.mark.parametrize("images", ["dict", "raw", "path"])
def test_chosen_rejected(images, tmp_path, settings):
    worlds.make_chosen_rejected(tmp_path, 5, images=images)
    source = open_source(settings(tmp_path))
    pairs = [source[i] for i in range(5)]
    assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) and p.prob == 1 for p in pairs)
    assert len({p.key for p in pairs}) == 5 and len({p.win.uid for p in pairs}) == 5
    assert pairs[0].caption == "a fox at dawn, number 0"


def test_embedded_images_are_known_by_their_content(tmp_path, settings):
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        worlds.make_chosen_rejected(tmp_path / name, 3)
        file = tmp_path / name / "train.parquet"
        pq.write_table(pq.read_table(file).take(order), file)
    keys = [[s[i].key for i in range(3)] for s in (open_source(settings(tmp_path / name)) for name in "ab")]
    assert keys[1] == [keys[0][i] for i in (2, 0, 1)]


def test_max_pairs_takes_the_first_usable_ones(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 20, ties=4, shards=4)
    every = open_source(settings(tmp_path))
    few = open_source(settings(tmp_path, max_pairs=7))
    assert [few[i].key for i in range(7)] == [every[i].key for i in range(7)] and len(few) == 7
    assert few.fingerprint != every.fingerprint


def test_fingerprint_knows_the_data_not_the_place(tmp_path, settings):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        worlds.make_pickapic(tmp_path / name, 8, seed=seed)
    a, b, c = (open_source(settings(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c
    file = next((tmp_path / "b").rglob("*.parquet"))
    table = pq.read_table(file)
    swapped = table.rename_columns(
        [{"label_0": "label_1", "label_1": "label_0"}.get(name, name) for name in table.column_names]
    )
    pq.write_table(swapped, file)
    assert open_source(settings(tmp_path / "b")).fingerprint != b  # judged the other way round


def test_missing_columns_name_those_found(tmp_path, settings):
    pq.write_table(pa.table({"text": ["a"], "picture": [b"x"]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: needs the columns .* found text, picture;"):
        open_source(settings(tmp_path))


def test_a_later_file_with_other_columns_is_named(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 4)
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "data" / "train-00009-of-00010.parquet")
    with pytest.raises(UserError, match=r"train-00009-of-00010.parquet: column jpg_0 is missing, found caption"):
        open_source(settings(tmp_path))


@pytest.mark.parametrize("name", ["has_label", "are_different"])
def test_a_later_file_with_more_labels_is_named(name, tmp_path, settings):
    worlds.make_pickapic(tmp_path, 4, shards=2)
    first = min(tmp_path.rglob("*.parquet"))
    pq.write_table(pq.read_table(first).drop_columns([name]), first)
    with pytest.raises(
        UserError, match=f"00001-of-00002.parquet: has a column {name}, which other files of the set lack"
    ):
        open_source(settings(tmp_path))


def test_no_usable_pairs(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 0, ties=3, unlabelled=2)
    with pytest.raises(UserError, match=r"no usable pairs \(5 rows: 0 pairs; left out: 3 ties, 2 unlabelled\)"):
        open_source(settings(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_file(damage, tmp_path, settings):
    worlds.make_pickapic(tmp_path, 4)
    file = next(tmp_path.rglob("*.parquet"))
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "text": b"no parquet at all", "empty": b""}[damage])
    with pytest.raises(UserError, match=r"parquet: cannot be read as parquet \(.*\); fetch it again") as caught:
        open_source(settings(tmp_path))
    assert "\n" not in str(caught.value)


def test_labels_that_are_no_numbers(tmp_path, settings):
    table = pa.table({"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"y"], "label_0": ["left"]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: the labels are not numbers"):
        open_source(settings(tmp_path))


def test_large_sets_get_a_window_and_few_row_groups_in_memory(tmp_path, settings, monkeypatch):
    worlds.make_pickapic(tmp_path, 60, row_group_size=3)
    whole = open_source(settings(tmp_path))
    assert whole.window is None
    wanted = sorted(whole[i].key for i in range(60))
    size = sum(
        pq.ParquetFile(next(tmp_path.rglob("*.parquet"))).metadata.row_group(0).column(i).total_uncompressed_size
        for i in (9, 10)
    )
    monkeypatch.setattr(parquet, "WINDOW_BYTES", 5 * size)
    source = open_source(settings(tmp_path))
    assert 3 <= source.window <= 5
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **k: reads.append(i) or original(self, i, **k)
    )
    made = stream(source, settings(tmp_path), Order(0, 0, 4, stop=60))
    keys = [int(k) for batch in made for k in batch.keys]
    assert sorted(keys) == wanted
    assert len(reads) == 20 and len(source.cache) <= source.window + 1  # each row group is read once an epoch
    assert not np.array_equal(reads, sorted(reads))


def test_oversized_row_groups_are_said(tmp_path, settings, monkeypatch, caplog):
    worlds.make_pickapic(tmp_path, 30, row_group_size=10)
    monkeypatch.setattr(parquet, "WINDOW_BYTES", 4000)
    assert open_source(settings(tmp_path)).window == 2
    assert "smaller row groups need less" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("pairs", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_pairs_keep_memory_flat(pairs, tmp_path, settings, monkeypatch):
    """Parquet of 12 KB a pair, at most 1/16 of which may be in use at once: the resident memory stays within a third of
    it (and 16 MB for the allocators)."""
    rng = np.random.default_rng(0)
    row = pq.read_table(worlds.make_pickapic(tmp_path / "one", 1)).to_pylist()[0]
    image = row["jpg_0"]
    (tmp_path / "set").mkdir()
    for shard in range(5):
        writer = pq.ParquetWriter(tmp_path / "set" / f"train-{shard:05d}-of-00005.parquet", worlds.pickapic_schema())
        for group in range(20):
            rows = []
            for i in range(pairs // 100):
                uid = f"{shard}-{group}-{i}"
                images = {
                    name: image + rng.bytes(6000) for name in ("jpg_0", "jpg_1")
                }  # what follows a picture is ignored
                rows.append(row | images | {"image_0_uid": uid + "a", "image_1_uid": uid + "b"})
            writer.write_table(pa.Table.from_pylist(rows, schema=worlds.pickapic_schema()))
        writer.close()
    size = pairs * 14_000
    monkeypatch.setattr(parquet, "WINDOW_BYTES", size // 16)
    cfg = settings(tmp_path / "set")
    source = open_source(cfg)
    assert len(source) == pairs and source.window < 8
    process = psutil.Process()
    seen, memory = set(), []
    for batch in stream(source, cfg, Order(0, 0, 20, stop=pairs), resolution=8):
        seen.update(batch.keys.tolist())
        memory.append(process.memory_info().rss)
    assert len(seen) == pairs
    assert max(memory) - memory[0] < size // 3 + 16 * 1024**2, (memory[0], max(memory))


# --- what cells may hold ---------------------------------------------------------------------------------------------


def rewritten(folder, change):
    """make_chosen_rejected with 4 rows changed by `change(rows)`."""
    file = worlds.make_chosen_rejected(folder, 4, images="raw") / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return folder


@pytest.mark.parametrize("captions", [(None, ""), ("", ""), (None, None)])
def test_no_caption_is_counted_among_the_pairs(captions, tmp_path, settings):
    def change(rows):
        rows[1]["prompt"], rows[2]["prompt"] = captions

    source = open_source(settings(rewritten(tmp_path, change)))
    assert describe(source) == "4 rows: 4 pairs, 2 without a caption" and source[1].caption == ""


def test_the_same_bytes_twice_are_no_pair(tmp_path, settings):
    plain = open_source(settings(rewritten(tmp_path / "a", lambda rows: None)))

    def change(rows):
        rows[1]["rejected"] = rows[1]["chosen"]
        rows[1]["prompt"] = rows[2]["prompt"] = None

    source = open_source(settings(rewritten(tmp_path / "b", change)))
    assert describe(source) == "4 rows: 3 pairs, 1 without a caption; left out: 1 one image twice"
    assert [source[i].win.uid for i in range(3)] == [plain[i].win.uid for i in (0, 2, 3)]
    assert source.fingerprint != plain.fingerprint


def test_paths_that_lead_to_one_image_are_no_pair(tmp_path, settings):
    file = worlds.make_chosen_rejected(tmp_path, 4, images="path") / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[0]["rejected"] = rows[0]["chosen"]
    (tmp_path / rows[2]["rejected"]).write_bytes((tmp_path / rows[2]["chosen"]).read_bytes())
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=3)
    source = open_source(settings(tmp_path))
    assert source.summary["one image twice"] == 2 and not source.cache
    assert [source[i].caption[-1] for i in range(2)] == ["1", "3"]


def test_the_same_bytes_in_a_large_set_are_holes_and_do_not_stop_the_run(tmp_path, settings, monkeypatch, caplog):
    def change(rows):
        for row in rows[1:]:
            row["rejected"] = row["chosen"]

    monkeypatch.setattr(parquet, "WINDOW_BYTES", 10)
    cfg = settings(rewritten(tmp_path, change), bad_image_limit=0.0, on_bad_image="stop")
    source = open_source(cfg)
    assert len(source) == 4
    usable = [int(batch.usable[0]) for batch in stream(source, cfg, Order(0, 0, 1, stop=8))]
    assert sum(usable) == 2
    assert sum("pair left out: one image twice, of 'a" in text for text in caplog.messages) == 3


@pytest.mark.parametrize("text", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("image", [pa.binary_view(), pa.large_binary()])
def test_views_and_other_spellings_of_text_and_bytes(text, image, tmp_path, settings):
    plain = open_source(settings(rewritten(tmp_path, lambda rows: None)))
    keys = [plain[i].key for i in range(4)]
    rows = pq.read_table(tmp_path / "train.parquet").to_pydict()
    columns = {"prompt": pa.array(rows["prompt"]).cast(text)} | {
        name: pa.array(rows[name], image) for name in ("chosen", "rejected")
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = open_source(settings(tmp_path))
    assert [source[i].key for i in range(4)] == keys
    assert source.caption_keys().tolist() == plain.caption_keys().tolist()


def test_uids_and_flags_in_views(tmp_path, settings):
    file = next(worlds.make_pickapic(tmp_path, 3).rglob("*.parquet"))
    table = pq.read_table(file)
    for name, values in {
        "image_0_uid": pa.array(["a", "b", "c"], pa.string_view()),
        "image_1_uid": pa.array(["a", "x", "y"], pa.string_view()),
        "has_label": pa.array(["True", "False", "yes"], pa.string_view()),
    }.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, file)
    source = open_source(settings(tmp_path))
    assert describe(source) == "3 rows: 1 pair; left out: 1 unlabelled, 1 one image twice"
    assert {source[0].win.uid, source[0].lose.uid} == {"c", "y"}


@pytest.mark.parametrize("start", ["", "data:image/jpeg;base64,"])
def test_base64_cells_are_images(start, tmp_path, settings):
    plain = open_source(settings(rewritten(tmp_path / "a", lambda rows: None)))

    def change(rows):
        for row in rows:
            for side in ("chosen", "rejected"):
                row[side] = start + base64.b64encode(row[side]).decode()

    source = open_source(settings(rewritten(tmp_path / "b", change)))
    assert [source[i].key for i in range(4)] == [plain[i].key for i in range(4)]
    assert source[0].win.load() == plain[0].win.load()


@pytest.mark.parametrize("cell", ["x" * 5000, "/9j/" + "A" * 5001, "a\0b" * 2000, b"x" * 5000])
def test_a_cell_that_is_no_image_is_a_short_message(cell, tmp_path, settings, caplog):
    def change(rows):
        for row in rows:
            row["chosen"], row["rejected"] = (cell, b"a" * 9) if isinstance(cell, bytes) else (cell, "b")
            row["prompt"] = "y" * 5000

    cfg = settings(rewritten(tmp_path, change), bad_image_limit=1.0)
    assert not next(stream(open_source(cfg), cfg, Order(0, 0, 4, stop=4))).usable.any()
    assert caplog.messages and all(len(text) < 400 and "\n" not in text for text in caplog.messages)


def test_images_as_arrays_are_refused_before_any_is_read(tmp_path, settings):
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [[[1, 2]]], "rejected": [[[1, 2]]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: the images in chosen are list<.*not files: give one image file"):
        open_source(settings(tmp_path))

"""Judged pairs as parquet: what this trainer, `datasets` and the other trainers read in it, and what is refused."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.data import writing
from dpo.data.sources import describe, open_source
from dpo.data.writing import Judged, write_pairs
from tests.help import worlds

BRIGHT, DARK = (worlds.encode(Image.new("RGB", (8, 8), (value,) * 3)) for value in (220, 30))


def rows(n=12, **changes):
    """Pairs whose bright image wins where it is the first (even rows) and where it is not; every fourth is a tie."""
    found = []
    for i in range(n):
        images = [(BRIGHT, f"b{i}"), (DARK, f"d{i}")][:: 1 if i % 2 == 0 else -1]
        label = 0.5 if i % 4 == 3 else float(i % 2 == 0)
        p = {0.0: 0.25, 0.5: 0.5, 1.0: 0.75}[label]
        extra = {"scorer": "a", "score_0": float(i), "old_label_0": float("nan") if i % 3 else 1.0}
        found.append(
            Judged(
                f"a boat, number {i // 2}",
                images[0][0],
                images[1][0],
                images[0][1],
                images[1][1],
                label,
                p,
                "m",
                "n",
                extra,
                2,
            )._replace(**changes)
        )
    return found


def is_bright(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean() > 100


@pytest.mark.parametrize("layout", ["pickapic", "chosen-rejected"])
@pytest.mark.parametrize("ties", ["drop", "keep"])
def test_the_trainer_reads_winner_and_probability(layout, ties, tmp_path, settings):
    assert write_pairs(tmp_path / "train.parquet", rows(), layout) == 12
    source = open_source(settings(tmp_path, ties=ties))
    pairs = [source[i] for i in range(len(source))]
    assert [p.prob for p in pairs] == ([0.75] * 3 + [0.5] * (ties == "keep")) * 3
    assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) for p in pairs if p.prob > 0.5)
    kept, out = (", 3 of them ties", "") if ties == "keep" else ("", "; left out: 3 ties")
    assert describe(source) == f"12 rows: {len(pairs)} pairs{kept}, 9 with a probability in column p{out}"


def test_columns_and_types_are_those_of_pick_a_pic(tmp_path):
    write_pairs(tmp_path / "a.parquet", rows(), "pickapic", begin=40)
    table = pq.read_table(tmp_path / "a.parquet")
    published = worlds.pickapic_schema(2)
    assert table.schema.names == [*published.names, "p", "scorer", "score_0", "old_label_0"]
    assert [table.schema.field(name).type for name in published.names] == published.types
    assert table["label_0"].to_pylist() == [1, 0, 1, 0.5] * 3 and table["label_1"].to_pylist() == [0, 1, 0, 0.5] * 3
    assert table["best_image_uid"].to_pylist()[:4] == ["b0", "b1", "b2", "tie"]
    assert table["__index_level_0__"].to_pylist() == list(range(40, 52)) and set(table["has_label"].to_pylist()) == {
        True
    }
    assert table["old_label_0"].null_count == 8 and table["num_example_per_prompt"].to_pylist() == [2] * 12


def test_other_trainers_find_the_winner(tmp_path):
    """Read as theirs do: only label_0 == 0 exchanges the images, and what is not dropped is a win of the first."""
    write_pairs(tmp_path / "a.parquet", rows(), "pickapic")
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    for drops_ties in (
        True,
        False,
    ):  # one drops them (the one that is told that the set is Pick-a-Pic), the other does not
        kept = [row for row in table if not (drops_ties and row["label_0"] == 0.5)]
        for row in kept:
            images = [Image.open(io.BytesIO(row[name])).convert("RGB") for name in ("jpg_0", "jpg_1")]
            first, second = images[::-1] if row["label_0"] == 0 else images
            if row["label_0"] != 0.5:
                assert np.asarray(first).mean() > np.asarray(second).mean()
        assert len(kept) == (9 if drops_ties else 12)


@pytest.mark.parametrize("layout", ["pickapic", "chosen-rejected"])
def test_datasets_reads_it(layout, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_pairs(tmp_path / "train.parquet", rows(), layout)
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "train.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(found) == 12 and found[0]["p"] == 0.75 and found[0]["scorer"] == "a"
    assert is_bright(found[0]["jpg_0" if layout == "pickapic" else "chosen"])


def test_equal_rows_are_equal_bytes_in_small_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "GROUP_BYTES", 3 * (len(BRIGHT) + len(DARK)))
    for name in "ab":
        write_pairs(tmp_path / name, iter(rows(7)), "pickapic", about={"made": "here"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    file = pq.ParquetFile(tmp_path / "a")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 1]
    assert file.schema_arrow.metadata[b"made"] == b"here"


def test_no_rows_are_a_file_of_none(tmp_path):
    assert write_pairs(tmp_path / "a.parquet", [], "pickapic") == 0
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 0


@pytest.mark.parametrize(
    "changes",
    [{"label_0": 0.3}, {"p": 1.2}, {"p": float("nan")}, {"label_0": 1.0, "p": 0.2}, {"extra": {"p": 1.0}}, {"extra": {"caption": "x"}}],
)  # fmt: skip
def test_what_is_no_label_is_refused_and_leaves_nothing(changes, tmp_path):
    with pytest.raises(ValueError):
        write_pairs(tmp_path / "a.parquet", rows(1, **changes), "pickapic")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_other_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="row 1: extra columns"):
        write_pairs(tmp_path / "a.parquet", [rows(1)[0], rows(1, extra={"another": 1.0})[0]], "pickapic")


def test_a_place_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((UserError, OSError), match="file"):
        write_pairs(tmp_path / "file" / "a.parquet", rows(1), "pickapic")


def of_json(folder):
    """The rows as JSON, with their images as files beside."""
    found = []
    for i, row in enumerate(rows()):
        for side, data in enumerate((row.first, row.second)):
            (folder / f"{i}-{side}.jpg").write_bytes(data)
        found.append({"caption": row.caption, "image_0": f"{i}-0.jpg", "image_1": f"{i}-1.jpg", "label_0": row.label_0})
        found[-1]["p"] = row.p if i else None
    return found


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tar", "arrow"])
def test_p_is_read_from_every_format_with_columns(kind, tmp_path, settings):
    found, place = of_json(tmp_path), tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        place.write_text("\n".join(map(json.dumps, found)))
    elif kind == "csv":
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)
    elif kind == "tar":
        with tarfile.open(place, "w") as tar:
            for i, row in enumerate(found):
                text = json.dumps({name: row[name] for name in ("caption", "label_0", "p")}).encode()
                for side in (0, 1):
                    tar.add(tmp_path / row[f"image_{side}"], f"{i}.image_{side}.jpg")
                info = tarfile.TarInfo(f"{i}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    else:
        import datasets

        files = {name: [(tmp_path / row[name]).read_bytes() for row in found] for name in ("image_0", "image_1")}
        others = {name: [row[name] for row in found] for name in ("caption", "label_0", "p")}
        datasets.Dataset.from_dict(others | files).save_to_disk(str(place))
    source = open_source(settings(place))
    assert [source[i].prob for i in range(9)] == [1.0] + [0.75] * 8
    assert all(is_bright(source[i].win.load()) for i in range(9))


def test_files_of_one_set_have_a_p_or_have_none(tmp_path, settings):
    worlds.make_pickapic(tmp_path / "data", 3, shards=1)
    write_pairs(tmp_path / "data" / "data" / "train-00001-of-00002.parquet", rows(), "pickapic")
    with pytest.raises(UserError, match="has a column p, which other files of the set lack"):
        open_source(settings(tmp_path / "data"))

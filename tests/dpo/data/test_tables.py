"""JSONL, JSON, CSV and folders: paths beside the table, captions from several places, mistakes named by their line."""

import json

import pytest

from dpo.common.errors import UserError
from dpo.data.sources import describe, open_source
from tests.dpo.data.test_parquet import is_bright
from tests.help import worlds


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables(kind, tmp_path, settings):
    path = worlds.make_table(tmp_path, 5, kind=kind)
    for data in (path, tmp_path, tmp_path / f"*.{kind}"):
        source = open_source(settings(data))
        pairs = [source[i] for i in range(5)]
        assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) for p in pairs)
        assert pairs[2].caption == "a tower at dawn, number 2"
        assert pairs[2].win.uid.startswith("images/") and pairs[2].win.data is None


def test_json_list_and_tab_separated(tmp_path, settings):
    rows = [json.loads(line) for line in worlds.make_table(tmp_path, 3).read_text().splitlines()]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "list.tsv").write_text("\n".join("\t".join(r) for r in [list(rows[0]), *(r.values() for r in rows)]))
    keys = [
        [s[i].key for i in range(3)] for s in (open_source(settings(tmp_path / f"list.{k}")) for k in ("json", "tsv"))
    ]
    assert keys[0] == keys[1]


def test_tables_may_hold_labels(tmp_path, settings):
    rows = [json.loads(line) for line in worlds.make_table(tmp_path, 4).read_text().splitlines()]
    labels = [0, 0.5, 0.3, None]  # the second image is the better one
    lines = [
        json.dumps({"caption": r["prompt"], "image_0": r["rejected"], "image_1": r["chosen"], "label_0": label})
        for r, label in zip(rows, labels, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(lines))
    source = open_source(settings(tmp_path / "pairs.jsonl"))
    assert [source[i].prob for i in range(2)] == pytest.approx([1.0, 0.7])
    assert all(is_bright(source[i].win.load()) for i in range(2))
    assert describe(source) == "4 rows: 2 pairs; left out: 1 ties, 1 unlabelled"


def test_other_columns_can_be_named(tmp_path, settings):
    path = worlds.make_table(tmp_path, 2)
    path.write_text(path.read_text().replace("chosen", "yes").replace("rejected", "no").replace("prompt", "words"))
    with pytest.raises(UserError, match=r"found words, yes, no; name others with --caption-column"):
        open_source(settings(path))
    assert len(open_source(settings(path, caption_column="words", chosen_column="yes", rejected_column="no"))) == 2


ROW = '{"prompt": "a", "chosen": "w.jpg", "rejected": "l.jpg"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("{not json}\n", "line 1: not JSON"),
        ("[1, 2\n", "line 2: not JSON"),
        ("3\n", "line 1: needs an object with named values, found int"),
        (ROW + '{"prompt": "b", "chosen": "w.jpg"}', "line 2: rejected needs the path"),
        (ROW.replace('"a"', '["a"]'), "line 1: prompt needs text, found list"),
        (
            '{"prompt": "a", "image_0": "w", "image_1": "l", "label_0": "left"}',
            "line 1: label_0 needs a number, found 'left'",
        ),
        (ROW, "relative to the table's folder"),
    ],
)
def test_mistakes_are_named_with_their_line(text, message, tmp_path, settings):
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(settings(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize("captions_in", ["metadata", "captions", "txt"])
def test_folders(captions_in, tmp_path, settings):
    worlds.make_folders(tmp_path, 4, captions_in=captions_in)
    source = open_source(settings(tmp_path))
    pairs = [source[i] for i in range(4)]
    assert [p.caption for p in pairs] == [pair["caption"] for pair in worlds.make_pairs(4)]
    assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) for p in pairs)


def test_folders_without_captions_and_without_partners(tmp_path, settings):
    worlds.make_folders(tmp_path, 4, captions_in="none")
    (tmp_path / "l" / "00002.jpg").rename(tmp_path / "l" / "other.jpg")
    source = open_source(settings(tmp_path))
    assert len(source) == 3 and source[0].caption == ""
    assert describe(source) == "5 rows: 3 pairs, 3 without a caption; left out: 2 without a partner"


def test_folders_match_across_file_types_and_below(tmp_path, settings):
    worlds.make_folders(tmp_path, 2, captions_in="none")
    for side, kind in (("w", "png"), ("l", "jpeg")):
        (tmp_path / side / "more").mkdir()
        (tmp_path / side / "more" / f"picture.{kind}").write_bytes(b"x")
    (tmp_path / "w" / "more" / "picture.txt").write_text("deep\n")
    source = open_source(settings(tmp_path))
    assert len(source) == 3 and source[2].win.uid == "w/more/picture.png" and source[2].caption == "deep"


def test_folder_of_a_split(tmp_path, settings):
    worlds.make_folders(tmp_path / "validation", 2)
    worlds.make_folders(tmp_path / "train", 3)
    assert len(open_source(settings(tmp_path))) == 3
    assert len(open_source(settings(tmp_path), "validation")) == 2


def test_empty_folders(tmp_path, settings):
    worlds.make_folders(tmp_path, 0)
    with pytest.raises(UserError, match="no usable pairs"):
        open_source(settings(tmp_path))


def test_metadata_without_names(tmp_path, settings):
    worlds.make_folders(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.jpg"}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: needs file_name and caption, found file"):
        open_source(settings(tmp_path))


def test_fingerprints_and_keys_do_not_depend_on_the_place(tmp_path, settings):
    sources = []
    for name in ("a", "b"):
        worlds.make_folders(tmp_path / name, 3)
        sources.append(open_source(settings(tmp_path / name)))
    assert sources[0].fingerprint == sources[1].fingerprint
    assert [sources[0][i].key for i in range(3)] == [sources[1][i].key for i in range(3)]

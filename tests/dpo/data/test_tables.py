"""JSONL, JSON and CSV: paths beside the table, mistakes named by their line, no cell repeated in a message."""

import base64
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.common.errors import UserError
from dpo.data import tables
from dpo.data.examples import open_pairs
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
    assert describe(source) == "4 rows: 2 pairs; left out: 1 tie, 1 unlabelled"


OF_LABELS = [  # rows without what is empty; of each that is a pair which image won, and how surely
    ([{"label_0": 1}, {"label_0": 1, "p": 0.6}, {"label_0": 0, "p": 0.3}], [(0, 1.0), (0, 0.6), (1, 0.7)]),
    ([{"label_0": 1}, {"label_0": 1}, {"label_0": 0, "p": 0.3}], [(0, 1.0), (0, 1.0), (1, 0.7)]),
    ([{"label_0": 1}, {"label_0": 0, "has_label": False}, {"label_0": 0}], [(0, 1.0), (1, 1.0)]),
    ([{"label_0": 1}, {"label_0": 0, "are_different": False}, {"label_0": 0}], [(0, 1.0), (1, 1.0)]),
    ([{}, {"label_0": 0}, {"label_0": 1}], [(1, 1.0), (0, 1.0)]),
    ([{"label_0": 1}, {"label_0": 0, "label_1": 1}, {"label_0": 0}], [(0, 1.0), (1, 1.0), (1, 1.0)]),
]


@pytest.mark.parametrize(("labels", "wanted"), OF_LABELS)
@pytest.mark.parametrize(("kind", "chunk"), [("jsonl", 8192), ("jsonl", 2), ("json", 2)])
def test_rows_may_leave_out_what_is_empty(labels, wanted, kind, chunk, tmp_path, settings, monkeypatch):
    """Wherever the first row stands that has it."""
    monkeypatch.setattr(tables, "CHUNK", chunk)
    rows = [json.loads(line) for line in worlds.make_table(tmp_path, 3).read_text().splitlines()]
    rows = [
        {"caption": str(i), "image_0": row["chosen"], "image_1": row["rejected"]} | label
        for i, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]
    path = tmp_path / f"pairs.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    source = open_source(settings(path))
    found = [(0 if is_bright(pair.win.load()) else 1, pair.prob) for pair in (source[i] for i in range(len(source)))]
    assert found == [(side, pytest.approx(prob)) for side, prob in wanted]


def test_the_probability_and_the_caption_may_first_stand_in_a_later_row(tmp_path, settings):
    path = worlds.make_table(tmp_path, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[0]["prompt"]
    rows[1]["p"] = 0.2
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(settings(path))
    assert [source[i].prob for i in range(3)] == pytest.approx([1.0, 0.8, 1.0])
    assert [is_bright(source[i].win.load()) for i in range(3)] == [True, False, True]
    assert source[0].caption == "" and source[2].caption == rows[2]["prompt"]


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


def test_a_path_given_twice_and_a_copied_file_are_no_pairs(tmp_path, settings, caplog):
    path = worlds.make_table(tmp_path, 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["rejected"] = "./" + rows[1]["chosen"]
    shutil.copy(tmp_path / rows[2]["chosen"], tmp_path / rows[2]["rejected"])
    for side in ("chosen", "rejected"):
        (tmp_path / rows[3][side]).unlink()  # missing is not the same
        (tmp_path / rows[4][side]).write_bytes(b"")  # nor is empty
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with caplog.at_level("WARNING", "dpo"):
        source = open_source(settings(path))
    gone = rows[3]["chosen"]
    assert f"1 of 4 pairs has an image that is not there, and is left out of every update: {gone}" in caplog.text
    assert [source[i].caption[-1] for i in range(4)] == ["0", "3", "4", "5"]
    assert describe(source) == "6 rows: 4 pairs; left out: 2 one image twice"
    few = open_source(settings(path, max_pairs=2))
    assert describe(few) == "6 rows: 2 pairs; left out: 2 one image twice, 2 by --max-pairs"


def test_two_columns_of_one_name_are_refused(tmp_path, settings):
    path = worlds.make_table(tmp_path, 2, kind="csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},prompt,", *(f"{line},other," for line in lines[1:])]))
    with pytest.raises(UserError, match="line 1: 2 columns are named 'prompt': rename all but one"):
        open_source(settings(path))
    path.write_text("\n".join(f"{line},," for line in lines))  # empty columns at the end, as spreadsheets write them
    assert len(open_source(settings(path))) == 2


def test_many_files_are_compared_in_order(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(tables, "AT_ONCE", 2)
    monkeypatch.setattr(tables, "CHUNK", 5)
    path = worlds.make_table(tmp_path, 12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i in (0, 3, 6):
        rows[i]["rejected"] = rows[i]["chosen"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for most in (None, 1, 4, 9):
        source = open_source(settings(path, max_pairs=most))
        kept = [i for i in range(12) if i not in (0, 3, 6)][:most]
        assert [source[i].caption.split()[-1] for i in range(len(source))] == [str(i) for i in kept]


def test_a_stray_quote_is_said_with_its_line(tmp_path, settings, caplog):
    path = worlds.make_table(tmp_path, 5, kind="csv")
    images = [line.rsplit(",", 2)[1:] for line in path.read_text().splitlines()]
    captions = ["prompt", "a boat", '"a fox', "a 12 cat", 'a dog 10"', "a hen"]  # opens in line 3, closes in line 5
    lines = [",".join([text, *names]) for text, names in zip(captions, images, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    source = open_source(settings(path))
    assert len(source) == 3 and source[1].caption.startswith("a fox,images/")
    assert "pairs.csv: captions with line breaks: 1, line 3 ('a fox,images" in caplog.text
    assert "a stray double quote" in caplog.text and len(caplog.messages[0]) < len(str(path)) + 200


def test_captions_without_a_stray_quote_are_not_said(tmp_path, settings, caplog):
    path = worlds.make_table(tmp_path, 2, kind="csv")
    path.write_text(path.read_text().replace("a fox at dawn, number 0", "a fox, at dawn "))
    assert len(open_source(settings(path))) == 2 and not caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_a_mark_of_byte_order_and_upper_case_names(kind, tmp_path, settings):
    path = worlds.make_table(tmp_path, 2, kind="csv" if kind == "csv" else "jsonl")
    text = path.read_text()
    if kind == "json":
        text = json.dumps([json.loads(line) for line in text.splitlines()])
    upper = tmp_path / "in" / f"PAIRS.{kind.upper()}"
    upper.parent.mkdir()
    (tmp_path / "images").rename(tmp_path / "in" / "images")
    upper.write_text("\ufeff" + text, encoding="utf-8")
    for data in (upper, upper.parent):
        assert len(open_source(settings(data))) == 2


BLOB = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 800).decode()  # begins as a JPEG file does


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", f"prompt,chosen,rejected\na,{BLOB},{BLOB}\n"),
        ("a.csv", f"prompt,chosen,rejected\na,{BLOB[1:]},{BLOB[1:]}\n"),  # not known as an image
        ("a.csv", f"{BLOB},w.jpg,l.jpg\n"),  # no header
        ("a.csv", f"prompt,chosen,rejected,label_0,image_0,image_1\na,,,{BLOB},w,l\n"),
        ("a.jsonl", json.dumps({"prompt": "a", "chosen": BLOB, "rejected": "l.jpg"})),
        ("a.jsonl", json.dumps({"prompt": "a", "chosen": "data:image/png;base64," + BLOB, "rejected": "l.jpg"})),
        ("a.jsonl", json.dumps({"prompt": "a", "chosen": {"bytes": BLOB, "path": None}, "rejected": "l.jpg"})),
        ("a.jsonl", json.dumps({"prompt": [BLOB], "chosen": "w.jpg", "rejected": "l.jpg"})),
        ("a.jsonl", json.dumps({"prompt": "a", "chosen": [BLOB], "rejected": "l.jpg"})),
        ("a.jsonl", json.dumps({BLOB: "a", "chosen": [BLOB], "rejected": "l.jpg"})),
        ("a.jsonl", json.dumps({"prompt": "a", "image_0": "w", "image_1": "l", "label_0": BLOB})),
        ("a.jsonl", json.dumps({"prompt": "a", "image_0": "w", "image_1": "l", "label_0": 1, "has_label": BLOB})),
        ("a.json", "[3]"),
        ("a.jsonl", '{"prompt": "\\ud83d", "chosen": "w.jpg", "rejected": "l.jpg"}'),
    ],
)
def test_a_message_is_one_short_line_whatever_a_cell_holds(name, text, tmp_path, settings):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        open_source(settings(tmp_path / name))
    message = str(caught.value).replace(str(tmp_path), "")
    assert "\n" not in message and len(message) < 500 and not set(re.findall(r"[\w/+]{100,}", message))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_a_file_in_a_folder_that_is_not_utf_8_is_named(kind, tmp_path, settings):
    worlds.make_table(tmp_path / "d", 2)
    (tmp_path / "d" / "pairs.jsonl").unlink()
    (tmp_path / "d" / f"pairs.{kind}").write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(UserError, match=rf"pairs\.{kind}: not UTF-8 text \(.* at byte \d+\); save it as UTF-8"):
        open_source(settings(tmp_path / "d"))


def test_words_of_flags(tmp_path, settings):
    path = worlds.make_table(tmp_path, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = ["caption,image_0,image_1,label_0,has_label"]
    lines += [f"x,{row['chosen']},{row['rejected']},1,{word}" for row, word in zip(rows, ("No", "yes"), strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert describe(open_source(settings(tmp_path / "a.csv"))) == "2 rows: 1 pair; left out: 1 unlabelled"
    (tmp_path / "a.csv").write_text("\n".join(lines).replace("yes", "perhaps"))
    with pytest.raises(UserError, match="a.csv, line 3: has_label says 'perhaps', neither yes nor no"):
        open_source(settings(tmp_path / "a.csv"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_imagefolder_of_two_images_a_row(kind, tmp_path, settings):
    path = worlds.make_table(tmp_path, 3, kind=kind)
    plain = open_source(settings(path))
    text = path.read_text().replace("chosen", "chosen_file_name").replace("rejected", "rejected_file_name")
    path.unlink()
    (tmp_path / f"metadata.{kind}").write_text(text)
    source = open_source(settings(tmp_path))
    assert [source[i].key for i in range(3)] == [plain[i].key for i in range(3)]


def test_images_beside_a_table_are_not_said_to_be_unread(tmp_path, settings):
    path = worlds.make_table(tmp_path, 2)
    path.write_text(path.read_text().replace("images/", ""))
    for image in (tmp_path / "images").iterdir():
        image.rename(tmp_path / image.name)
    (tmp_path / "notes.md").write_text("x")
    assert describe(open_source(settings(tmp_path))) == "2 rows: 2 pairs; files not read: 1 .md"


def test_a_quote_that_is_never_closed_is_named_with_its_line(tmp_path, settings, caplog):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\na,w.jpg,l.jpg\n"b,w.jpg,l.jpg\nc,w.jpg,l.jpg\n')
    with pytest.raises(UserError, match="a.csv, line 3: chosen needs the path of an image, found None"):
        open_source(settings(tmp_path / "a.csv"))
    assert "line 3 (" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_images_without_partners_are_read_from_every_kind_of_table(kind, tmp_path, settings):
    path = worlds.make_labelled(tmp_path, 7, kind="parquet" if kind == "saved" else kind)
    if kind == "saved":
        path = worlds.make_saved(tmp_path / "saved", pq.read_table(path).to_pylist())
    source = open_source(settings(path, label_smoothing=0.1))
    images = [source[i] for i in range(7)]
    assert source.sides == 1 and source.prob.tolist() == [1, 1, 0, 1, 1, 0, 1]
    assert [one.prob for one in images] == pytest.approx([0.9, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9])
    assert [is_bright(one.win.load()) for one in images] == [True, True, False, True, True, False, True]
    assert (
        all(one.lose is None and one.images == (one.win,) for one in images) and len({one.key for one in images}) == 7
    )
    assert describe(source) == "7 rows: 7 images, 5 of them liked" and images[2].caption == "a tower at dawn, number 2"
    few = open_source(settings(path, max_pairs=2))
    assert len(few) == 2 and few[1].key == images[1].key and few.fingerprint != source.fingerprint
    assert len(set(source.caption_keys().tolist())) == 7


def of_labels(tmp_path, labels, header="prompt,image,label"):
    worlds.make_labelled(tmp_path, len(labels))
    names = sorted(path.name for path in (tmp_path / "images").iterdir())[: len(labels)]
    lines = [f"a fox,images/{name},{label}" for name, label in zip(names, labels, strict=True)]
    (tmp_path / "own.csv").write_text("\n".join([header, *lines]))
    return tmp_path / "own.csv"


def test_labels_are_yes_or_no_in_words_or_numbers_and_empty_ones_are_left_out(tmp_path, settings):
    source = open_source(settings(of_labels(tmp_path, ["true", "1", "Yes", "False", "0", "no", "", " "])))
    assert describe(source) == "8 rows: 6 images, 3 of them liked; left out: 2 unlabelled"
    assert source.prob.tolist() == [1, 1, 1, 0, 0, 0]
    path = of_labels(tmp_path, ["1", "good"])
    with pytest.raises(UserError, match="own.csv, line 3: label says 'good', neither yes nor no"):
        open_source(settings(path))
    with pytest.raises(
        UserError, match="own.csv: no usable images .2 rows: 0 images, 0 of them liked; left out: 2 unlab"
    ):
        open_source(settings(of_labels(tmp_path, ["", ""])))


def test_columns_of_images_without_partners_can_be_named(tmp_path, settings):
    path = of_labels(tmp_path, [1, 0], "prompt,photo,thumb")
    with pytest.raises(
        UserError, match="or caption, image, label of images without partners, found prompt, photo, thumb"
    ):
        open_source(settings(path))
    source = open_source(settings(path, single_image_column="photo", liked_column="thumb"))
    assert source.sides == 1 and source.prob.tolist() == [1, 0]
    with pytest.raises(UserError, match="need a caption, an image and a label in each row, found prompt, photo, thumb"):
        open_source(settings(path, single_image_column="photo", liked_column="nonesuch"))
    pairs = worlds.make_table(tmp_path / "pairs", 2)
    assert open_source(settings(pairs)).sides == 2
    with pytest.raises(UserError, match="images without partners .docs/data.md., and open_pairs opens pairs"):
        open_pairs(path, single_image_column="photo", liked_column="thumb")


def test_an_image_without_partner_that_is_not_there_is_said_and_left_out(tmp_path, settings, caplog):
    path = worlds.make_labelled(tmp_path, 3)
    next((tmp_path / "images").iterdir()).unlink()
    assert len(open_source(settings(path))) == 3
    assert "1 of 3 rows has an image that is not there, and is left out of every update: images/" in caplog.text


@pytest.mark.parametrize("labels", [[1, 0, None], [1.0, 0.0, None], ["yes", "no", None], [True, False, None]])
def test_labels_in_parquet_may_be_of_any_type_and_null(labels, tmp_path, settings):
    rows = pq.read_table(worlds.make_labelled(tmp_path / "made", 3, kind="parquet")).to_pylist()
    found = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "images.parquet")
    source = open_source(settings(tmp_path / "images.parquet"))
    assert describe(source) == "3 rows: 2 images, 1 of them liked; left out: 1 unlabelled"
    pq.write_table(pa.Table.from_pylist([row | {"label": 3} for row in rows]), tmp_path / "images.parquet")
    with pytest.raises(
        UserError, match="images.parquet: the labels are not numbers or flags .label says 3, neither yes nor"
    ):
        open_source(settings(tmp_path / "images.parquet"))

"""Tables of other programs: prompts of images and scores of images, found by file or hash; mistakes are one line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.evaluating import tables
from dpo.evaluating.sides import of_table


def test_rows_of_every_kind(tmp_path):
    (tmp_path / "a.csv").write_text("file,Prompt\nx.png,a fox\n")
    (tmp_path / "a.tsv").write_text("file\tprompt\nx.png\ta, fox\n")
    (tmp_path / "a.jsonl").write_text('\ufeff{"file_name": "x.png", "correct": true}\n\n')
    assert [tables.cell(row, tables.PROMPT) for _, row in tables.rows(tmp_path / "a.csv")] == ["a fox"]
    assert [tables.cell(row, tables.PROMPT) for _, row in tables.rows(tmp_path / "a.tsv")] == ["a, fox"]
    ((number, row),) = tables.rows(tmp_path / "a.jsonl")
    assert (number, tables.cell(row, tables.SCORE), tables.cell(row, tables.SEED)) == (1, "1", None)


@pytest.mark.parametrize("content", ["[1]\n", "{", "\x00", '{"a": ' * 5000])
def test_what_is_no_table_is_one_line(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl") as caught:
        list(tables.rows(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_prompt_with_the_separator_in_it_is_not_cut(tmp_path, name, mark):
    (tmp_path / name).write_text(f"file{mark}prompt\nx.png{mark}a cat\ny.png{mark}a fox{mark} red\n")
    with pytest.raises(UserError, match=r"a\.[ct]sv, line 3: more values than columns.* double quotes"):
        list(tables.rows(tmp_path / name))


def test_an_image_is_found_by_path_or_its_last_parts():
    path = Path("/runs/images/00000/samples/0001.png")
    assert tables.of_file(path, {"samples/0001.png": 1.0, "0001.png": 2.0}, 0.0) == 1.0, "the longest name wins"
    assert tables.of_file(path, {"samples\\0001.png": 1.0}, 0.0) == 1.0
    assert tables.of_file(path, {str(path): 3.0, "0001.png": 2.0}, 0.0) == 3.0
    assert tables.of_file(path, {"1.png": 1.0}, 0.0) == 0.0


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "midjourney"
    (place / "deep").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "deep/c.webp"):
        Image.new("RGB", (8, 8)).save(place / name, {"png": "PNG", "JPG": "JPEG", "webp": "WEBP"}[name.split(".")[1]])
    return place


def test_a_row_is_of_one_file_of_a_folder(folder, tmp_path, caplog):
    """Not of every file that ends so: the one it names from the folder on, or from the table on."""
    (folder / "prompts.csv").write_text("file,prompt\na.png,a fox\n")
    for old in ("old", "midjourney"):
        (folder / old).mkdir()
        Image.new("RGB", (8, 8)).save(folder / old / "a.png")
    assert [image.path for image in of_table("mj", folder, None).images] == [folder / "a.png"]
    assert "4 of 5 images have no row" in caplog.text
    (tmp_path / "own.csv").write_text("file,prompt\nmidjourney/old/a.png,a fox\n")
    assert [image.path for image in of_table("mj", folder, tmp_path / "own.csv").images] == [folder / "old" / "a.png"]
    (folder / "a.png").unlink()
    with pytest.raises(
        UserError,
        match=r"prompts\.csv, row 1: names both .*midjourney/midjourney/a\.png and .*old/a\.png: give more of the path",
    ):
        of_table("mj", folder, None)


def test_a_folder_of_somebody_elses_images(folder, tmp_path, caplog):
    rows = [
        {"file": "a.png", "prompt": "a fox", "seed": 7},
        {"file": "deep/c.webp", "prompt": "a cat", "category": "pets"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    side = of_table("mj", folder, None)
    assert [(image.path.name, *image[1:]) for image in side.images] == [
        ("a.png", "a fox", 7, ""),
        ("c.webp", "a cat", None, "pets"),
    ]
    assert side.protocol is None and side.prompts == 2 and "1 of 3 images has no row" in caplog.text
    (tmp_path / "own.csv").write_text("image,text\nb.JPG,a dog\n")
    assert [image.prompt for image in of_table("mj", folder, tmp_path / "own.csv").images] == ["a dog"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "does not say what its images were drawn from: give --captions"),
        ("file,prompt\nz.png,a fox\n", "names none of the 3 images"),
        ("file,words\na.png,a fox\n", r"row 1: needs a file \(.*\) and a prompt"),
        ("file,prompt,seed\na.png,a fox,1.5\n", "the seed '1.5' is no whole number"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(folder, table, words):
    if table is not None:
        (folder / "prompts.csv").write_text(table)
    with pytest.raises(UserError, match=words):
        of_table("mj", folder, None)

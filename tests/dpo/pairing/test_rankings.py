"""Tables and folders as people keep them -> images with a number, their prompts and groups."""

import json

import pytest

from dpo.common.errors import UserError
from dpo.pairing.asked import Asked
from dpo.pairing.columns import Named
from dpo.pairing.rankings import read


@pytest.fixture
def images(tmp_path):
    """Files a.png to f.png, which nobody opens here."""
    for name in "abcdef":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    return tmp_path


def ranked(folder, text, name="t.csv", encoding="utf-8", **asked):
    (folder / name).write_text(text, encoding=encoding, newline="")
    return read(Asked(folder / name, **asked))


def told(found):
    """{image: (number, prompt, group)}."""
    return {
        image.stem: (value, found.prompts[group], found.groups[group])
        for image, value, group in zip(found.images, found.values.tolist(), found.group.tolist(), strict=True)
    }


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_with_any_delimiter_and_mark(images, delimiter, encoding):
    rows = [("image", "score", "prompt"), ("a.png", "1.5", "Füchse"), ("b.png", "2", "Füchse"), ("c.png", "", "Füchse")]
    found = ranked(images, "\r\n".join(map(delimiter.join, rows)), encoding=encoding)
    assert told(found) == {"a": (1.5, "Füchse", "Füchse"), "b": (2.0, "Füchse", "Füchse")}
    assert found.counts == {"rows": 3, "without a number": 1, "rated again": 0}
    assert found.direction == "chosen is the one with the higher score"


def test_numbers_with_a_decimal_comma(images):
    assert told(ranked(images, "image;score;prompt\na.png;1,5;x\n"))["a"][0] == 1.5
    with pytest.raises(UserError, match="line 2: score needs a number, found '1,5'"):
        ranked(images, 'image,score,prompt\na.png,"1,5",x\n')


def test_a_comma_before_three_digits_is_refused_unless_the_column_says_what_it_is(images):
    """1,234 is 1.234 or 1234: by one reading a.png is the best, by the other the worst."""
    text = "image;score;prompt\na.png;{};x\nb.png;{};x\n"
    for ambiguous, other in (("1,234", "900"), (" -12,500", "1"), ("1,234", "2,345"), ("1,234", "1.5")):
        with pytest.raises(UserError) as error:
            ranked(images, text.format(ambiguous, other))
        number = ambiguous.strip()
        dot, none = number.replace(",", "."), number.replace(",", "")
        assert f"line 2: score: {number} is {dot} or {none}: write it without the comma" in str(error.value)
    for other in ("1,5", "0,875", "1234,567"):
        assert told(ranked(images, text.format("1,234", other)))["a"][0] == 1.234, "a decimal comma, by the other cell"
    assert told(ranked(images, text.format("0,875", "2")))["a"][0] == 0.875


def test_jsonl_groups_and_ranks(images):
    rows = [
        {"image": "a.png", "rank": 1, "group": 7, "prompt": "x"},
        {"image": "b.png", "rank": 2, "group": 7},
        {"image": "c.png", "rank": 1, "group": 8, "prompt": "x"},
    ]
    found = ranked(images, "\n".join(map(json.dumps, rows)), "t.jsonl", higher_is_better=False)
    assert told(found) == {"a": (1, "x", "7"), "b": (2, "x", "7"), "c": (1, "x", "8")}
    assert found.scores.tolist() == [-1, -2, -1] and found.direction == "chosen is the one with the lower rank"
    found = ranked(images, "\n".join(map(json.dumps, rows[1::-1])), "t.jsonl", higher_is_better=False)
    assert told(found) == {"a": (1, "x", "7"), "b": (2, "x", "7")}, "the first row may be the one without a prompt"
    with pytest.raises(UserError, match="line 2: group '7' has two prompts, 'x' and 'y'"):
        rows[1]["prompt"] = "y"
        ranked(images, "\n".join(map(json.dumps, rows)), "t.jsonl", higher_is_better=False)


def test_prompts_missing_beside_the_image_or_one_for_all(images):
    text = "image,score,prompt\na.png,1,x\nb.png,2,\n"
    assert ranked(images, text).counts["without a prompt"] == 1
    assert {one[1] for one in told(ranked(images, text, prompt="all")).values()} == {"all"}
    (images / "a.txt").write_text("beside\n")
    found = ranked(images, "image,score\na.png,1\nb.png,2\n")
    assert told(found) == {"a": (1, "beside", "beside")} and found.counts["without a prompt"] == 1


def test_an_image_rated_again_has_the_mean_and_one_that_is_gone_is_left_out(images, caplog):
    found = ranked(images, "image,score,prompt\na.png,1,x\n./a.png,4,x\nz.png,2,x\nb.png,2,x\n")
    assert told(found) == {"a": (2.5, "x", "x"), "b": (2, "x", "x")}
    assert (found.counts["rated again"], found.counts["without their file"]) == (1, 1)
    assert "line 4: no such image file" in caplog.text and "1 image that is not there is left out" in caplog.text
    with pytest.raises(UserError, match=r"t\.csv, line 2: no such image file.*--images FOLDER"):
        ranked(images, "image,score,prompt\nz.png,1,x\n")
    with pytest.raises(UserError, match=r"it is written with \\, as on Windows: write / here"):
        ranked(images, "image,score,prompt\nred\\z.png,1,x\n")
    (images / "below").mkdir()
    assert "a" in told(ranked(images / "below", "image,score,prompt\na.png,1,x\n", images=images))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("image,score\na.png,many\n", "line 2: score needs a number, found 'many'"),
        ("image,score\na.png,inf\n", "needs a number, found 'inf'"),
        ("image,score\n,1\n", "line 2: names no image"),
        ("image,score\na.png,\n", "no row has a number in 'score'"),
        ("image,score,group\na.png,1,\n", "has no 'group'"),
        (f"image,score,{'a' * 140_000}\na.png,1,x\n", "line 1: not CSV (field larger than field limit"),
        ("winner,loser,prompt\na.png,,x\n", "a match needs the winner and the loser"),
        ("winner,loser,tie,prompt\na.png,b.png,perhaps,x\n", "line 2: tie says 'perhaps', neither yes nor no"),
    ],
)
def test_bad_tables_are_named_by_their_line(images, text, words):
    with pytest.raises(UserError) as error:
        ranked(images, text)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_matches_are_found_and_have_no_direction_to_choose(images):
    text = "winner,loser,prompt\na.png,b.png,x\n"
    assert told(ranked(images, text))["a"][0] > told(ranked(images, text))["b"][0]
    with pytest.raises(UserError, match="says who won: leave --higher-is-better"):
        ranked(images, text, higher_is_better=True)


def test_folders_by_stars(tmp_path, caplog):
    for place, name, text in [
        ("5", "a.png", "x"),
        ("4.5 stars", "b.PNG", "x"),
        ("1", "c.png", None),
        ("notes", "d.png", "x"),
    ]:
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_bytes(b"x")
        if text:
            (tmp_path / place / name).with_suffix(".txt").write_text(text)
    found = read(Asked(tmp_path))
    assert told(found) == {"a": (5, "x", "x"), "b": (4.5, "x", "x")}
    assert found.direction == "chosen is the one with more stars" and found.counts["without a prompt"] == 1
    assert "notes is no number of stars" in caplog.text
    assert told(read(Asked(tmp_path, prompt="y", higher_is_better=False)))["c"] == (1, "y", "y")
    with pytest.raises(UserError, match="names of columns are of tables"):
        read(Asked(tmp_path, columns=Named(image="x")))


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["w", "l"], "looks like pairs already"),
        (
            [f"g{n:02}" for n in range(12, 0, -1)],
            f"found {', '.join(f'g{n:02}' for n in range(1, 13))}; or name a table",
        ),
        (["5", "4"], "no images in 4, 5"),
        ([], "no such file or folder"),
    ],
)
def test_folders_that_are_no_stars(tmp_path, places, words):
    for place in places:
        (tmp_path / "t" / place).mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        read(Asked(tmp_path / "t"))


def test_pairs_are_named_as_such(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="if these are pairs, train with --data"):
        read(Asked(tmp_path / "t.parquet"))

"""Prompts, pictures and tables that mean harm, from the command line of dpo.sample and dpo.evaluate to the page in a browser."""

import json
import os
import re
import shutil

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from dpo import evaluate, sample
from dpo.common.pictures import pixel_hash
from dpo.common.words import UNPRINTABLE
from dpo.drawing.grid import read_grid
from tests.help.drawing import said
from tests.help.pages import Page, look
from tests.help.worlds import make_pipeline

JUDGE = "tests.help.judges:Together"
DRAW = ["--seeds", "2", "--batch", "8", "--steps", "2", "--guidance", "2", "--device", "cpu", "--sheets", "4"]
EVIL = [
    "<script>document.title = 1; console.log('ran')</script>",
    "<img src=x onerror=\"console.log('ran')\"><a href='javascript:console.log(1)'>",
    "</td></table></style></title>--><svg onload=console.log('ran')>",
    "../../../etc/passwd",
    "..\\..\\C:\\CON",
    "/dev/null\u2215.png",
    "x" * 10_000,
    "fox " * 2_500,
    "🦊👩‍👩‍👧‍👦" * 20,
    "\u202egpj.exe \u2066\u200f\u061c",
    "nul \0 in it",
    "two\nlines\r\nand\u2028more\x85",
    "\x1b[2J\x1b]0;title\x07\x9b31m red \b\b",
    "| a | b | \\| `c` **d** \\",
    "{{ 7 * 6 }} {% raw %} %s ${x} $\\frac{1}{",
    "--output=/tmp/x",
    "&lt;b&gt; &amp; \" ' ]]> <!--",
]
NAME = "<b>'$\\frac{'\u202e|\\| \x1b[31m & co"  # of a side


@pytest.fixture
def call(capsys):
    """Runs a command: its exit code, and the lines on stderr, none of which moves a terminal's cursor."""

    def run(main, *words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        err = capsys.readouterr().err
        assert "Traceback" not in err and not UNPRINTABLE.search(err), err
        return code, err.splitlines()

    return run


def tables_of(text):
    """Cells by row of every table in Markdown, as a renderer reads them; no HTML of ours is in it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert not [token for token in tokens for each in (token, *(token.children or [])) if each.type.startswith("html")]
    rows = []
    for token in tokens:
        rows += [0] * (token.type == "tr_open")
        if token.type in ("td_open", "th_open"):
            rows[-1] += 1
    return rows


def checked_page(folder, tmp_path):
    """The page of an evaluation: whole for a parser, and quiet in a browser."""
    text = (folder / "evaluation.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and all(ref.startswith(("data:", "#")) for ref in page.refs)
    table = (folder / "evaluation.md").read_text("utf-8")
    assert not UNPRINTABLE.search(table), "a terminal may show it"
    assert (rows := tables_of(table)) and set(rows) == {7}
    for width in (360, 1200):
        seen, console = look(text, tmp_path, width)
        assert console == [] and seen["overflow"] == 0 and all(seen["pictures"])
    return page


@pytest.mark.slow
def test_hostile_prompts_pass_through_everything(world, tmp_path, call):
    table = tmp_path / "p.jsonl"
    table.write_text("".join(json.dumps({"prompt": text, "category": text[:400]}) + "\n" for text in EVIL))
    models = {"a": world("sd15"), "b": make_pipeline(tmp_path / "other", "sd15", seed=1)}
    for name, model in models.items():
        code, lines = call(sample.main, model, "--prompts", table, *DRAW, "--output", tmp_path / name)
        assert code == 0, lines
        made = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*") if path.is_file()}
        images = sorted(path for path in made if path.startswith("images/"))
        assert len(images) == 2 * len(EVIL) and all(
            re.fullmatch(r"images/\d{6}-[0-9a-f]{8}\.png", one) for one in images
        )
        assert {path for path in made - set(images) if not path.startswith((".lock", "sheets/sheet-"))} == {
            "protocol.json"
        }
        assert [said(tmp_path / name / path)["prompt"] for path in images] == [text for text in EVIL for _ in range(2)]
        cells = [cell for path in sorted((tmp_path / name / "sheets").iterdir()) for cell in read_grid(path)]
        assert [cell.prompt for cell in cells] == [text for text in EVIL for _ in range(2)]
    out = tmp_path / "out"
    words = [f"{NAME}={tmp_path / 'a'}", f"other{NAME}={tmp_path / 'b'}", "--scorers", JUDGE, "--output", out]
    code, lines = call(evaluate.main, *words)
    assert code == 0, lines
    found = json.loads((out / "evaluation.json").read_text())
    (entry,) = found["results"]
    assert {row[0] for row in entry["gains"] + entry["losses"]} <= set(EVIL) and entry["paired"]["prompts"] == len(EVIL)
    assert set(entry["categories"]) == {text[:400] for text in EVIL}
    checked_page(out, tmp_path)


def hostile_folder(place, shade, **more):
    """A folder of pictures in the two halves of which a prompt means harm and a file cannot be read."""
    place.mkdir()
    rows = []
    for number, text in enumerate(EVIL):
        Image.new("RGB", (16, 16), (shade + 5 * number, 0, 0)).save(place / f"{number:02d}.png")
        rows.append({"file": f"{number:02d}.png", "prompt": text, "category": text[:400]})
    for number, (name, make) in enumerate(more.items()):
        make(place / f"{name}.png")
        rows.append({"file": f"{name}.png", "prompt": f"readable {number}"})
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def good(path):
    Image.new("RGB", (20, 12), "green").save(path)


def half(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])


BAD = {
    "bomb": lambda path: Image.new("L", (20_000, 20_000)).save(path, compress_level=1),
    "half": half,
    "text": lambda path: path.write_text("no image"),
    "empty": lambda path: path.write_bytes(b""),
    "pipe": lambda path: os.mkfifo(path),
    "loop": lambda path: path.symlink_to(path.name),
    "gone": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "narrow": lambda path: Image.new("RGB", (1, 60_000)).save(path),
    "program": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
}


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links as POSIX has them")
def test_hostile_pictures_are_counted_and_the_rest_is_scored(tmp_path, call):
    a = hostile_folder(tmp_path / "a", 10, **dict.fromkeys(BAD, good))
    b = hostile_folder(tmp_path / "b", 30, **BAD)
    (tmp_path / "b" / "cycle").symlink_to(tmp_path / "b", target_is_directory=True)
    out = tmp_path / "out"
    code, lines = call(evaluate.main, a, b, "--scorers", JUDGE, "--output", out)
    assert code == 0, lines
    found = json.loads((out / "evaluation.json").read_text())
    unusable = {os.path.basename(path).partition(".")[0]: why for path, why in found["sides"][1]["unusable"]}
    assert unusable.keys() == BAD.keys() - {"gone", "folder"} and all(len(why) < 400 for why in unusable.values())
    assert not [why for why in unusable.values() if "--max-image" in why]
    assert found["results"][0]["paired"]["images"] == len(EVIL)
    (told,) = [line for line in lines if "cannot be read" in line]
    assert sum(f"2 of {len(EVIL) + len(BAD)} rows name no image" in line for line in lines) == 1
    assert f"{len(BAD) - 2} images of b cannot be read and are left out" in told and "narrow.png (" in told
    checked_page(out, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as POSIX has them")
@pytest.mark.parametrize("bad", ["half", "text", "empty", "pipe", "loop", "gone", "bomb"])
def test_a_hostile_picture_of_a_drawn_set_is_drawn_again_or_named(world, tmp_path, call, bad):
    words = [world("sd15"), "--prompts", "a", "b", "--batch", "2", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    out = tmp_path / "out"
    assert call(sample.main, *words, "--output", out)[0] == 0
    path = sorted((out / "images").iterdir())[1]
    before = path.read_bytes()
    path.unlink()
    BAD[bad](path)
    code, lines = call(evaluate.main, out, out.parent / "out" / ".", "--scorers", JUDGE, "--output", tmp_path / "e")
    assert code == 2 and "two sides are called" in lines[-1]
    code, lines = call(evaluate.main, out, f"b={out}", "--scorers", JUDGE, "--output", tmp_path / "e")
    assert code == 2 and "1 of 2 images is missing or broken, the first is 1" in lines[-1]
    assert call(sample.main, *words, "--output", out)[0] == 0 and path.read_bytes() == before


DEEP = '{"file": "00.png", "prompt": ' + "[" * 100 + "]" * 100 + "}\n"
GOOD = '{"file": "00.png", "prompt": "a fox"}\n'


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (DEEP, "row 1: prompt needs text, found a list of 1"),
        ('{"file": "00.png", "prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"file": "00.png", "prompt": "half \\ud800"}\n', "row 1: the prompt 'half \\ud800' holds half a character"),
        ('{"file": {"a": 1}, "prompt": "x"}\n', "row 1: file needs text, found a dict of 1"),
        ('{"file": "00.png", "prompt": "x", "seed": "--5"}\n', "the seed '--5' is no whole number"),
        ('{"file": "00.png", "prompt": "x", "seed": "' + "9" * 6000 + '"}\n', "is no whole number"),
        ('{"file": "00.png", "prompt": "x", "seed": NaN}\n', "the seed 'nan' is no whole number"),
        ("\0\0\0\n", "cannot be read"),
        ("", "names none of the"),
        (GOOD + '{"file": "00.png", "prompt": "a cat"}\n', "2 rows name 00.png"),
    ],
)
def test_hostile_captions_are_one_line(tmp_path, call, table, told):
    a = hostile_folder(tmp_path / "a", 10)
    (captions := tmp_path / "captions.jsonl").write_text(table)
    words = [a, f"b={a}", "--captions", captions, "--scorers", JUDGE, "--output", tmp_path / "out"]
    code, lines = call(evaluate.main, *words)
    assert code == 2 and told in lines[-1] and len([line for line in lines if line.startswith("dpo.evaluate: ")]) == 1


def test_rows_of_missing_files_are_counted(tmp_path, call):
    a = hostile_folder(tmp_path / "a", 10)
    rows = [json.dumps({"file": f"{number:02d}.png", "prompt": "a fox"}) + "\n" for number in range(90)]
    (captions := tmp_path / "captions.jsonl").write_text("".join(rows))
    code, lines = call(
        evaluate.main, a, f"b={a}", "--captions", captions, "--scorers", JUDGE, "--output", tmp_path / "out"
    )
    assert code == 0 and sum(f"{90 - len(EVIL)} of 90 rows" in line and "no image" in line for line in lines) == 2


def hashes(folder):
    return {path.name: pixel_hash(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_scores_by_file_and_by_hash_mixed(tmp_path, call):
    """Without any scorer, which would have read the pictures."""
    a, b = hostile_folder(tmp_path / "a", 10), hostile_folder(tmp_path / "b", 92)
    rows = []
    pictures = [(f"{side.name}/{name}", key) for side in (a, b) for name, key in hashes(side).items()]
    for number, (name, key) in enumerate(pictures):
        kinds = [{"file": name}, {"hash": key}, {"hash": key.upper(), "file": f"elsewhere-{number}.png"}]
        rows.append(kinds[number % 3] | {"score": float(number)})
    (table := tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, lines = call(evaluate.main, a, b, "--scores", f"theirs={table}", "--output", tmp_path / "out")
    assert code == 0, lines
    paired = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"][0]["paired"]
    assert paired["images"] == len(EVIL) and paired["difference"] == len(EVIL)


@pytest.mark.parametrize(
    ("row", "code", "told"),
    [
        ("b/00.png,nan", 0, "1 of 17 images of b has no score in"),
        ("b/00.png,1e999", 0, "1 of 17 images of b has no score in"),
        ("b/00.png,much", 2, "'much' is not a number"),
        ("b/00.png," + "9" * 500, 0, "1 of 17 images of b has no score in"),
        ("b/00.png,1\nb/00.png,1", 0, ""),
        ("b/00.png,1\nb/00.png,2", 2, "rows 34 and 35 give b/00.png different scores, 1 and 2"),
        ("b/00.png,1\nnowhere.png,2", 0, ""),
        ("b/00.png,0x10", 2, "'0x10' is not a number"),
        ("b/00.png,", 2, "needs a file"),
        ("b/00.png,1,2,3,4", 2, "more values than columns"),
        ("b/00.png," + "x" * 200_000, 2, "(200000 in all) is not a number"),
    ],
)
def test_hostile_scores_are_one_line(tmp_path, call, row, code, told):
    a, b = hostile_folder(tmp_path / "a", 10), hostile_folder(tmp_path / "b", 90)
    lines = [f"{side}/{number:02d}.png,{number}" for side in "ab" for number in range(17)]
    lines.remove("b/00.png,0")
    (table := tmp_path / "t.csv").write_text("\n".join(["file,score", *lines, row]) + "\n")
    found, said = call(evaluate.main, a, b, "--scores", f"t={table}", "--output", tmp_path / "out")
    assert found == code and (not told or sum(told in line for line in said) == 1), said
    assert len([line for line in said if line.startswith("dpo.evaluate: ")]) == (code == 2)
    if "no score" in told:
        paired = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"][0]["paired"]
        assert paired["images"] == 16


def test_a_name_of_a_side_is_no_path(world, tmp_path, call):
    """Sides are drawn below the output, each into its own folder, whatever their names are."""
    words = ["--prompts", "a", "--steps", "1", "--guidance", "1", "--device", "cpu", "--scorers", JUDGE]
    out, model = tmp_path / "deep" / "out", world("sd15")
    code, lines = call(evaluate.main, f"..={model}", f"{'x' * 300}={model}", *words, "--output", out)
    assert code == 0, lines
    assert not (out / "protocol.json").exists() and len(list((out / "images").iterdir())) == 2
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out"]
    code, lines = call(evaluate.main, f"a b={model}", f"A-b={model}", *words, "--output", tmp_path / "two")
    assert code == 2 and "a b and A-b" in lines[-1] and "call them apart" in lines[-1]
    shutil.rmtree(tmp_path / "deep")


@pytest.mark.long
def test_names_of_files_that_are_no_text(tmp_path, call):
    """As another system's zip leaves them; the page says which they are."""
    a, b = hostile_folder(tmp_path / "a", 10), hostile_folder(tmp_path / "b", 90)
    try:
        os.rename(b / "00.png", os.fsencode(b) + b"/caf\xe9<b>\x1b.png")
    except (OSError, ValueError):
        pytest.skip("this file system has names of text alone")
    rows = [{"file": "caf\udce9<b>\x1b.png", "prompt": EVIL[0]}]
    rows += [{"file": f"{number:02d}.png", "prompt": text} for number, text in enumerate(EVIL) if number]
    (b / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    code, lines = call(evaluate.main, a, b, "--scorers", JUDGE, "--output", out)
    assert code == 0, lines
    assert json.loads((out / "evaluation.json").read_text())["results"][0]["paired"]["images"] == len(EVIL)
    checked_page(out, tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        [sample.main, "x" * 5000, "--prompts", "a"],
        [sample.main, "embedded", "--prompts", "a", "--init-image", "x" * 5000],
        [evaluate.main, "a=" + "x" * 5000, "b=y", "--scorers", JUDGE],
        [evaluate.main, "a", "b", "--scorers", JUDGE, "--captions", "x" * 5000],
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, call, words):
    for side in "ab":
        hostile_folder(tmp_path / side, 10)
    main, *rest = words
    rest = [str(tmp_path / word) if word in ("a", "b") and main is evaluate.main else word for word in rest]
    code, lines = call(main, *rest, "--output", tmp_path / "out")
    assert code == 2 and len(lines) == 1 and "too long" in lines[0]

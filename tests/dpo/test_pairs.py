"""dpo.pairs as a command: a ranking becomes a set that trains, a set is looked at, and a folder is never overwritten in silence."""

import json
import shlex
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dpo.data.images import decode
from dpo.data.sources import describe, open_source
from dpo.pairing.asked import Looking
from dpo.pairing.look import Looker
from dpo.settings.config import Data
from dpo.settings.flags import parse
from tests.help import worlds
from tests.help.commands import tree
from tests.help.pages import Page
from tests.help.pairing import make_ranking, paired
from tests.help.running import advance, make_run

LOW = ("--lower-is-better", "--resolution", 32)


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    return make_ranking(tmp_path_factory.mktemp("ranking"))


def rows(output):
    return [json.loads(line) for line in (output / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(output):
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def brightness(ref):
    return np.asarray(decode(ref.load()), dtype=float)[..., 0].mean()


@pytest.mark.parametrize(("resolution", "preset"), [(512, "sd15-lora-8gb"), (1024, "sdxl-lora-12gb")])
def test_the_command_that_trains_on_the_pairs_is_not_refused(resolution, preset):
    words = shlex.split(Looking(resolution).training("my pairs"))
    assert words == ["python", "-m", "dpo.train", "--preset", preset, "--data", "my pairs"]
    config, notes = parse(words[3:])  # refuses what a run would refuse before it looks for the model
    assert config.data.data == "my pairs" and config.model.model and config.lora.lora and notes == []


@pytest.mark.long
def test_a_ranking_becomes_a_folder_that_trains(ranking, tmp_path, capsys, world):
    output = tmp_path / "my pairs"
    code, said = paired(capsys, ranking, *LOW, output=output)
    assert code == 0 and f"then train with {Looking(32).training(str(output))}\n" in said, said
    assert "chosen is the one with the lower rank" in said and "20 pairs; left out: 4 ties" in said
    found = rows(output)
    assert len(found) == 20 and [(row["rank_chosen"], row["rank_rejected"]) for row in found[:5]] == [
        (1, 2), (1, 3), (1, 3), (2, 3), (2, 3),
    ]  # fmt: skip
    source = open_source(Data(data=str(output)))
    assert describe(source) == "20 rows: 20 pairs", "what this command puts beside its pairs is nobody's file"
    (output / "notes.txt").touch()
    (output / ".mine").touch()
    assert describe(open_source(Data(data=str(output)))) == "20 rows: 20 pairs; files not read: 1 .txt, 1 hidden"
    assert source[1].caption == "a fox, number 0"
    assert all(brightness(source[i].win) > brightness(source[i].lose) for i in (1, 2, 3, 4))
    (warned,) = summary(output)["warnings"]
    assert warned.startswith("20 pairs are few") and warned in said
    run = make_run(world("sd15"), str(output), tmp_path / "run", "--batch-size", "2", "--validation-fraction", "0")
    assert np.isfinite(advance(run, 1)[0]["loss"])


@pytest.mark.long
def test_the_set_is_the_same_moved_with_its_images_or_embedded(ranking, tmp_path, capsys):
    shutil.copytree(ranking.parent, tmp_path / "here")
    assert paired(capsys, tmp_path / "here/ranking.csv", *LOW, output=tmp_path / "here/pairs")[0] == 0
    before = open_source(Data(data=str(tmp_path / "here/pairs")))
    keys = [before[i].key for i in range(len(before))]
    (tmp_path / "here").rename(tmp_path / "there")
    after = open_source(Data(data=str(tmp_path / "there/pairs")))
    assert [after[i].key for i in range(20)] == keys and after[0].win.load()
    code, said = paired(capsys, tmp_path / "there/ranking.csv", *LOW, "--embed", output=tmp_path / "embedded")
    assert code == 0 and not (tmp_path / "embedded/pairs.jsonl").exists(), said
    shutil.rmtree(tmp_path / "there/images")
    inside = open_source(Data(data=str(tmp_path / "embedded")))
    assert describe(inside) == "20 rows: 20 pairs"
    original = ranking.parent / "images/0-0.jpg"
    assert len(inside) == 20 and inside[0].win.load() == original.read_bytes(), "the files' own bytes"
    code, said = paired(capsys, "--check", tmp_path / "embedded", "--resolution", 32, output=tmp_path / "look")
    page = Page((tmp_path / "look/pairs.html").read_text(encoding="utf-8")).text
    assert code == 0 and page.startswith("Chosen is the one with the lower rank", page.index("Chosen is")), said
    assert "chosen, rank 1" in page and "rejected, rank 3" in page


@pytest.mark.long
def test_the_same_command_gives_the_same_bytes_and_another_one_is_refused(ranking, tmp_path, capsys, monkeypatch):
    output = tmp_path / "pairs"
    made = []
    for _ in range(2):
        assert paired(capsys, ranking, *LOW, "--max-per-image", 2, output=output)[0] == 0
        made.append(
            {name: (output / name).read_bytes() for name in ("pairs.jsonl", "summary.json", "pairs.html", "sheet.png")}
        )
    first = made[0]
    assert made[1] == first
    left = summary(output)["left_out"]["by_max_per_image"]
    times = Counter(row[side] for row in rows(output) for side in ("chosen", "rejected"))
    assert left > 0 and left + len(rows(output)) == 20 and max(times.values()) == 2
    with monkeypatch.context() as patched:
        patched.setattr(Looker, "all", lambda *_: pytest.fail("images were opened before it was refused"))
        code, said = paired(capsys, ranking, "--higher-is-better", "--max-per-image", 2, output=output)
    (line,) = [line for line in said.splitlines() if " INFO " not in line]
    assert code == 2 and 'by: "chosen is the one with the lower rank" there' in line
    assert (output / "pairs.jsonl").read_bytes() == first["pairs.jsonl"], "a refusal changes nothing"
    code, said = paired(capsys, ranking, "--higher-is-better", "--embed", "--overwrite", output=output)
    assert code == 0 and not (output / "pairs.jsonl").exists() and (output / "data").is_dir(), said


def test_what_others_made_is_not_touched(ranking, tmp_path, capsys):
    output = tmp_path / "mine"
    output.mkdir()
    for name in ("notes.txt", "summary.json"):
        (output / name).write_text("{}")
        before = tree(output)
        code, said = paired(capsys, ranking, *LOW, "--overwrite", output=output)
        assert code == 2 and f"holds {name} that python -m dpo.pairs did not make" in said
        assert {k: v for k, v in tree(output).items() if ".lock" not in k} == before
        (output / name).unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a ranking"),
        (["x.csv", "--check", "y"], "one of the two"),
        (["x.csv", "--data-format", "csv"], "--data-format is of --check"),
        (["--check", "y", "--embed"], "--embed is of a ranking"),
        (["--check", "y", "--lower-is-better"], "--higher-is-better or --lower-is-better is of a ranking"),
        (["x.csv", "--prompt", " "], "is empty"),
        (["x.csv", "--min-margin", "-1"], "needs a number of at least 0, not '-1'"),
        (["x.csv", "--min-margin", "x"], "argument --min-margin: needs a number of at least 0, not 'x'"),
        (["x.csv", "--prompt", "a", "--caption-column", "b"], "leave --caption-column out"),
        (["x.csv", "--seed", "3"], "--seed has no effect without --max-per-image"),
        (["x.csv", "--lower-is-better", "--higher-is-better"], "not allowed with"),
    ],
)
def test_flags_that_do_nothing_are_refused(words, said, tmp_path, capsys):
    code, wrote = paired(capsys, *words, output=tmp_path / "out")
    assert code == 2 and said in wrote and len(wrote.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_more_pairs_than_anybody_trains_on_are_refused_before_an_image_is_opened(
    ranking, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("dpo.pairing.work.AT_MOST", 19)
    monkeypatch.setattr("dpo.pairing.look.decode", lambda data: pytest.fail("an image was opened"))
    code, said = paired(capsys, ranking, *LOW, output=tmp_path / "out")
    assert code == 2 and "16 images in 4 groups make 20 pairs, more than 19: take --pair best-worst" in said


def test_rankings_without_a_pair_say_why(tmp_path, capsys):
    path = make_ranking(tmp_path, prompts=1)
    for text, words in [
        ("images/0-0.jpg,1,a\nimages/0-1.jpg,2,b\n", "each of 2 images has a prompt of its own"),
        ("images/0-0.jpg,1,\n", "no row is left (1 row, 1 without a prompt"),
        ("images/0-0.jpg,1,a\nimages/0-1.jpg,1,a\n", "no pair can be made (0 pairs; left out: 1 tie)"),
    ]:
        path.write_text("image,rank,prompt\n" + text)
        code, said = paired(capsys, path, *LOW, output=tmp_path / "out")
        assert code == 2 and words in said.splitlines()[-1], said
        assert not (tmp_path / "out").exists(), "a refusal leaves no folder"
    assert paired(capsys, "--check", tmp_path / "none", output=tmp_path / "deep/look")[0] == 2
    assert not (tmp_path / "deep").exists()


def test_a_look_at_any_set(tmp_path, capsys, monkeypatch):
    """Pick-a-Pic with ties and a broken image, and two folders: counts, warnings, a sheet and a page without script."""
    pickapic = worlds.make_pickapic(tmp_path / "p", 6, ties=2, broken=("truncated",))
    code, said = paired(capsys, "--check", pickapic, "--resolution", 64, output=tmp_path / "look")
    assert code == 0 and "9 rows: 7 pairs; left out: 2 ties" in said
    found = summary(tmp_path / "look")
    assert (found["pairs"], found["captions"], found["images_looked_at"]) == (7, 7, 13) and found["source"]["ties"] == 2
    assert [line.split(" ", 1)[1].split(",")[0][:22] for line in found["warnings"]] == [
        "image cannot be read", "pairs are few", "of 13 images have a si",
    ]  # fmt: skip
    text = (tmp_path / "look/pairs.html").read_text(encoding="utf-8")
    shown = Page(text)
    assert "Chosen is the image that this set prefers" in shown.text and "script" not in shown.tags
    assert text.count("<figure") == 6, "the pair with the broken image is not shown"
    with Image.open(tmp_path / "look/sheet.png") as sheet:
        left, right = (np.asarray(sheet.convert("RGB"), dtype=float)[180, x] for x in (100, 320))
    assert left[0] > left[2] and right[2] > right[0], "the winner is red and stands on the left"
    folders = worlds.make_folders(tmp_path / "f", 3, captions_in="none")
    code, said = paired(capsys, "--check", folders, "--resolution", 32, output=tmp_path / "other")
    assert code == 0 and "3 of 3 pairs have no caption" in said
    monkeypatch.setattr("dpo.pairing.work.of_store", lambda source: source)
    code, said = paired(capsys, "--check", folders, output=tmp_path / "store")
    assert code == 2 and "is a prepared store" in said
    code, said = paired(capsys, "--check", folders, output=folders / "look")
    assert code == 2 and "lies in the folder of the pairs" in said


def test_a_look_never_deletes_the_pairs_that_are_looked_at(ranking, tmp_path, capsys):
    output = tmp_path / "pairs"
    assert paired(capsys, ranking, *LOW, output=output)[0] == 0
    for named in ("pairs.jsonl", "*.jsonl"):
        code, said = paired(capsys, "--check", output / named, "--overwrite", output=output)
        assert code == 2 and "holds the pairs" in said and (output / "pairs.jsonl").is_file()


def test_a_set_beside_one_of_ours_is_not_taken_for_it(ranking, tmp_path, capsys):
    assert paired(capsys, ranking, *LOW, output=tmp_path / "pairs")[0] == 0
    other = worlds.make_table(tmp_path / "pairs/other", 2)
    code, _ = paired(capsys, "--check", other, output=tmp_path / "look")
    page = Page((tmp_path / "look/pairs.html").read_text(encoding="utf-8")).text
    assert code == 0 and "Chosen is the image that this set prefers" in page and "rejected, rank" not in page

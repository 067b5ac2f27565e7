"""dpo.label, from its command line to the folder that trainers read: anew labelled sets, drawn images, mistakes in one line."""

import io
import json
import os
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo import label
from dpo.data import labelled as sets
from dpo.data.sources import describe, open_source
from dpo.data.writing import Judged, write_pairs
from dpo.labelling import scale, work, written
from dpo.pages import labels as pages
from dpo.scorers.cache import ScoreCache
from dpo.settings.config import Data
from tests.help import worlds
from tests.help.children import start_command
from tests.help.judges import TRIED, Grey
from tests.help.labelling import GREY, images_of, labelled, left, rows
from tests.help.pages import Page


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pick-a-Pic pairs with ties, soft labels, rows without a label and pairs that are judged twice."""
    return worlds.make_pickapic(
        tmp_path_factory.mktemp("pairs"), 20, ties=4, unlabelled=3, soft=2, duplicates=3, shards=2
    )


@pytest.fixture(autouse=True)
def without_charts(monkeypatch):
    """Charts, which have tests of their own, take most of the time of a small set."""
    monkeypatch.setattr(pages, "write_histogram", lambda path, apart, margin: path.write_bytes(b""))
    monkeypatch.setattr(pages, "svg", lambda *given, **named: "<svg></svg>")


def grey(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").convert("L"), dtype=np.float64).mean() / 255


def test_every_row_is_labelled_anew_in_its_order(pairs, tmp_path, capsys):
    seen = Grey.seen
    code, said = labelled(capsys, "--data", pairs, *GREY, "--rows-per-file", 10, output=tmp_path / "out")
    assert code == 0, said
    before, found = rows(pairs), rows(tmp_path / "out")
    kept = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1")
    assert [[row[name] for name in kept] for row in found] == [[row[name] for name in kept] for row in before]
    assert [row["old_label_0"] for row in found] == [row["label_0"] for row in before]
    for row in found:
        apart = grey(row["jpg_0"]) - grey(row["jpg_1"])
        assert row["score_0"] - row["score_1"] == pytest.approx(apart, abs=1e-6)
        assert row["label_0"] == row["p"] == float(apart > 0) == 1 - row["label_1"] and row["scorer"] == "grey"
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == [
        f"train-{i:05d}-of-00004.parquet" for i in range(4)
    ]
    assert Grey.seen - seen - TRIED == len({row[name] for row in before for name in ("jpg_0", "jpg_1")}), (
        "an image is scored once"
    )
    assert "Agreement with the old labels: 1.000" in said


def test_the_trainer_reads_it_with_no_flag_and_nothing_odd_to_say(pairs, tmp_path, capsys):
    labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    worlds.make_folders(tmp_path / "out" / "images", 3)
    source = open_source(Data(data=str(tmp_path / "out")))
    assert describe(source) == "32 rows: 32 pairs" and (source.prob == 1).all()
    assert all(grey(source[i].win.load()) > grey(source[i].lose.load()) for i in range(32))
    content = sets.read(tmp_path / "out")
    sets.write(tmp_path / "out", {**content, "finished": False})
    with pytest.raises(Exception, match="its labels are not all written: the same python -m dpo.label goes on"):
        open_source(Data(data=str(tmp_path / "out")))


def test_datasets_finds_it(pairs, tmp_path, capsys, monkeypatch):
    import datasets

    labelled(capsys, "--data", pairs, *GREY, "--rows-per-file", 20, output=tmp_path / "out")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert found.keys() == {"train"} and len(found["train"]) == 32 and set(found["train"]["label_0"]) <= {0.0, 1.0}


def test_soft_labels_reach_the_trainer_as_p(pairs, tmp_path, capsys):
    code, said = labelled(
        capsys, "--data", pairs, "--scorer", "tests.help.judges:Dark", "--labels", "soft", output=tmp_path / "out"
    )
    assert code == 0, said
    found = rows(tmp_path / "out")
    for row in found:
        assert row["p"] == pytest.approx(1 / (1 + np.exp(-6.0 * (row["score_0"] - row["score_1"]))), abs=1e-6)
        assert row["label_0"] == float(row["p"] > 0.5)
    source = open_source(Data(data=str(tmp_path / "out")))
    assert source.prob == pytest.approx([max(row["p"], 1 - row["p"]) for row in found])
    assert f"{len(found)} rows: {len(found)} pairs, {len(found)} with a probability in column p" in describe(source)
    assert all(grey(source[i].win.load()) < grey(source[i].lose.load()) for i in range(len(source)))
    code, said = labelled(capsys, "--data", pairs, *GREY, "--labels", "soft", output=tmp_path / "none")
    assert code == 2 and "grey has no temperature of its own" in said
    code, said = labelled(
        capsys, "--data", pairs, *GREY, "--temperature", 3, "--margin", 0.18, output=tmp_path / "given"
    )
    found = rows(tmp_path / "given")
    assert code == 0 and {row["label_0"] for row in found} == {0.0, 0.5, 1.0}
    assert all((abs(row["score_0"] - row["score_1"]) <= 0.18) == (row["label_0"] == 0.5) for row in found)
    assert found[0]["p"] == pytest.approx(1 / (1 + np.exp(-3 * (found[0]["score_0"] - found[0]["score_1"]))), abs=1e-6)


def test_a_vote_stores_every_score_its_weights_and_what_standardised_it(pairs, tmp_path, capsys):
    words = ["--scorers", "tests.help.judges:Grey=3", "tests.help.judges:Dark=1", "--layout", "chosen-rejected"]
    code, said = labelled(capsys, "--data", pairs, *words, output=tmp_path / "out")
    assert code == 0, said
    made = sets.read(tmp_path / "out")["made_by"]["scorers"]
    assert [(one["name"], one["weight"]) for one in made] == [("grey", 3.0), ("dark", 1.0)]
    for row in rows(tmp_path / "out"):
        for side in ("chosen", "rejected"):
            parts = [
                (row[f"score_{side}_{one['name']}"] - one["mean"]) / one["spread"] * one["weight"] / 4 for one in made
            ]
            assert row[f"score_{side}"] == pytest.approx(sum(parts))
        assert grey(row["chosen"]) > grey(row["rejected"]) and row["p"] == 1.0, "three against one"
        assert row["score_chosen"] > row["score_rejected"] and (row["old_label_chosen"] or 1) >= 0.5


def test_what_is_said_of_images_goes_with_them_and_old_labels_are_labels(pairs, tmp_path, capsys):
    """Of a set with soft labels the label is kept, not its probability; of chosen-rejected all columns turn with the images."""
    labelled(capsys, "--data", pairs, *GREY, "--temperature", 3, "--margin", 0.18, output=tmp_path / "soft")
    soft = rows(tmp_path / "soft")
    words = ["--data", tmp_path / "soft", "--scorers", "tests.help.judges:Dark"]
    assert labelled(capsys, *words, output=tmp_path / "again")[0] == 0
    again = rows(tmp_path / "again")
    assert [row["old_label_0"] for row in again] == [row["label_0"] for row in soft] and 0.5 in {
        row["label_0"] for row in soft
    }
    assert labelled(capsys, *words, "--layout", "chosen-rejected", output=tmp_path / "turned")[0] == 0
    for row, before in zip(rows(tmp_path / "turned"), again, strict=True):
        assert grey(row["chosen"]) <= grey(row["rejected"]) and row["score_chosen"] >= row["score_rejected"]
        assert row["score_chosen"] == pytest.approx(1 - grey(row["chosen"]), abs=1e-6)
        turned = before["label_0"] == 0.0
        assert row["old_label_chosen"] == (1 - before["old_label_0"] if turned else before["old_label_0"])
    assert labelled(capsys, "--data", tmp_path / "turned", *GREY, output=tmp_path / "third")[0] == 0
    assert {row["old_label_0"] for row in rows(tmp_path / "third")} <= {0.5, 1.0}


def test_images_that_no_scorer_looks_at_are_looked_at_all_the_same(tmp_path, capsys):
    pairs = worlds.make_pickapic(tmp_path / "pairs", 6, broken=("truncated", "corrupt"))
    names = {row[f"image_{side}_uid"] for row in rows(pairs) for side in (0, 1)}
    (tmp_path / "table.csv").write_text(
        "file,score\n" + "".join(f"{name},{n}\n" for n, name in enumerate(sorted(names)))
    )
    words = ["--data", pairs, "--scores", f"mine={tmp_path / 'table.csv'}"]
    code, said = labelled(capsys, *words, output=tmp_path / "out")
    assert code == 0 and "reading: 2 of " in said and len(rows(tmp_path / "out")) == 6


def test_what_cannot_be_is_found_before_anything_is_scored(tmp_path, capsys):
    seen = Grey.seen
    pairs = worlds.make_pickapic(tmp_path / "pairs", 6)
    code, said = labelled(capsys, "--data", pairs, *GREY, "--fit-temperature", output=tmp_path / "out")
    assert code == 2 and "needs 40 labelled pairs" in said
    code, said = labelled(capsys, "embedded", "--prompts", "a red fox", *GREY, output=tmp_path / "one")
    assert code == 2 and "one model with --seeds 1 draws one image of a prompt" in said
    bare = images_of(tmp_path / "bare", 3, 1)
    (bare / "metadata.jsonl").unlink()
    code, said = labelled(capsys, "embedded", bare, "--prompts", "a red fox", *GREY, output=tmp_path / "two")
    assert code == 2 and "give --captions" in said and not list((tmp_path / "two").rglob("*.png"))
    assert Grey.seen == seen + 3 * TRIED


def test_an_image_that_was_swapped_in_place_is_not_labelled_already(tmp_path, capsys):
    """Another picture of the same name and as many bytes; a copy of the whole folder is the same."""
    folder = images_of(tmp_path / "images", 3, 2)
    words = [str(folder), *GREY]
    assert labelled(capsys, *words, output=tmp_path / "out")[0] == 0
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    assert "the labels are there already" in labelled(capsys, *words, output=tmp_path / "out")[1]
    (folder / "000.png").write_bytes((folder / "000.png").read_bytes()[:-1] + b"x")
    code, said = labelled(capsys, *words, output=tmp_path / "out")
    assert code == 2 and "holds labels of other pairs" in said


def test_another_programs_scores(pairs, tmp_path, capsys):
    names = {row[f"image_{side}_uid"]: grey(row[f"jpg_{side}"]) for row in rows(pairs) for side in (0, 1)}
    lines = "".join(f"{name},{-score}\n" for name, score in names.items())
    (tmp_path / "table.csv").write_text("file,score\n" + lines)
    code, said = labelled(
        capsys, "--data", pairs, "--scores", f"mine={tmp_path / 'table.csv'}", output=tmp_path / "out"
    )
    assert code == 0, said
    assert all(row["label_0"] == float(grey(row["jpg_0"]) < grey(row["jpg_1"])) for row in rows(tmp_path / "out"))
    (tmp_path / "few.csv").write_text("file,score\n" + "".join(lines.splitlines(keepends=True)[:40]))
    code, said = labelled(
        capsys, "--data", pairs, "--scores", f"mine={tmp_path / 'few.csv'}", *GREY, "mine=2", output=tmp_path / "few"
    )
    assert code == 0 and "images have no score, and their pairs are left out; the first: image " in said
    assert 0 < len(rows(tmp_path / "few")) < 32
    assert [one["weight"] for one in sets.read(tmp_path / "few")["made_by"]["scorers"]] == [1.0, 2.0]


@pytest.mark.long
def test_a_temperature_fitted_on_labels_beats_hard_ones_on_held_out_prompts(tmp_path, capsys):
    from dpo.tiny.paths import train_pairs_path

    code, said = labelled(
        capsys,
        "--data",
        train_pairs_path(),
        "--scorers",
        "tiny-a",
        "--fit-temperature",
        "--max-pairs",
        300,
        output=tmp_path / "out",
    )
    assert code == 0, said
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())
    fit = figures["fitted"]
    assert fit["after"] > fit["sure"], "hard labels, each as sure as they are right on average"
    assert 2 < fit["temperature"] < 8 and figures["own_temperature"] == 4.0, "the raters' slope is 4"
    assert fit["pairs"] + fit["held_out"] <= 300 and "mean log-likelihood" in said
    clipped = np.log(0.01) * (1 - figures["agreement_with_old_labels"]["share"])
    assert fit["after"] > clipped, "nor do hard labels that are 99 % sure"


def test_a_temperature_is_fitted_on_other_pairs_for_images_without_labels(tmp_path, capsys):
    found = [{**row, "label": (i % 4 > 0)} for i, row in enumerate(rows(worlds.make_pickapic(tmp_path / "clean", 120)))]
    judged = [
        Judged(
            row["caption"],
            *(row[f"jpg_{side}"] for side in sides),
            *(row[f"image_{side}_uid"] for side in sides),
            1.0,
            1.0,
        )
        for row in found
        for sides in [(0, 1) if row["label"] == (row["label_0"] == 1) else (1, 0)]
    ]
    (tmp_path / "noisy").mkdir()
    write_pairs(tmp_path / "noisy" / "train.parquet", judged, "pickapic")
    images = images_of(tmp_path / "images", 4, 2)
    code, said = labelled(capsys, images, *GREY, "--fit-temperature", tmp_path / "noisy", output=tmp_path / "out")
    assert code == 0, said
    temperature = json.loads((tmp_path / "out" / "summary.json").read_text())["temperature"]
    apart = np.mean([abs(grey(row["jpg_0"]) - grey(row["jpg_1"])) for row in found])
    assert temperature * apart == pytest.approx(np.log(3), abs=0.4), "three of four labels follow the scores"
    assert all(
        row["p"] == pytest.approx(1 / (1 + np.exp(-temperature * (row["score_0"] - row["score_1"]))))
        for row in rows(tmp_path / "out")
    )
    code, said = labelled(capsys, images, *GREY, "--fit-temperature", tmp_path / "clean", output=tmp_path / "other")
    assert code == 2 and "every label follows the scores" in said


def test_images_of_folders_are_paired_and_labelled(tmp_path, capsys):
    a, b = images_of(tmp_path / "a", 6, 3), images_of(tmp_path / "b", 6, 3, seed=1)
    code, said = labelled(capsys, f"one={a}", b, *GREY, output=tmp_path / "out")
    assert code == 0, said
    found = rows(tmp_path / "out")
    assert sorted(row["caption"] for row in found) == [f"prompt {i}" for i in range(6)]
    assert {row[f"model_{side}"] for row in found for side in (0, 1)} == {"one", "b"}
    assert 0 < sum(row["label_0"] for row in found) < 6, "the better one stands on either side"
    for row in found:
        number = int(row["caption"].split()[1])
        shades = [grey((place / f"{number * 3 + i:03d}.png").read_bytes()) for place in (a, b) for i in range(3)]
        assert sorted([row["score_0"], row["score_1"]]) == pytest.approx([min(shades), max(shades)], abs=1e-6)
        assert row["num_example_per_prompt"] == 1 and "old_label_0" not in row
    code, said = labelled(
        capsys, a, b, *GREY, "--pairing", "random", "--pairs-per-prompt", 4, output=tmp_path / "random"
    )
    assert code == 0 and len(rows(tmp_path / "random")) == 24


DRAWN = [
    "--prompts", "a red fox", "a blue boat", "--seeds", "3", "--steps", "1", "--batch", "2", "--device", "cpu", "--pairing", "all",
    "--rows-per-file", "5", *GREY,
]  # fmt: skip


def test_models_draw_what_is_labelled(world, tmp_path, capsys):
    code, said = labelled(capsys, f"a={world('sd15')}", *DRAWN, output=tmp_path / "out")
    assert code == 0, said
    found = rows(tmp_path / "out")
    assert len(found) == 6 and {row["caption"] for row in found} == {"a red fox", "a blue boat"}
    assert describe(open_source(Data(data=str(tmp_path / "out")))) == "6 rows: 6 pairs", "its images lie beside"
    code, said = labelled(capsys, tmp_path / "out" / "images" / "a", *DRAWN[-6:], output=tmp_path / "again")
    assert code == 0 and [{**r, "protocol": 0} for r in rows(tmp_path / "again")] == [
        {**r, "protocol": 0} for r in found
    ]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is a fork here")
def test_processes_share_the_drawing(world, tmp_path, capsys):
    words = [f"a={world('sd15')}", f"b={world('sd2v')}", *DRAWN]
    assert labelled(capsys, *words, output=tmp_path / "whole")[0] == 0
    log = tmp_path / "log.txt"
    shared = [*map(str, words), "--output", str(tmp_path / "out"), "--shard"]
    children = [start_command([*shared, f"{number}/2"], log, label.main, fresh=True) for number in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0], log.read_text()
    assert left(tmp_path / "out").keys() == left(tmp_path / "whole").keys()
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def killed_once(monkeypatch, target, name, after):
    """The function of that name ends as Ctrl-C does at its call number `after`."""
    original, calls = getattr(target, name), []

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(target, name, stopping)


@pytest.mark.parametrize(
    ("target", "name", "after"), [(ScoreCache, "put", 2), (written, "write_pairs", 3), (sets, "write", 3)]
)
def test_stopped_anywhere_the_same_command_ends_in_the_same_bytes(
    pairs, tmp_path, capsys, monkeypatch, target, name, after
):
    words = ["--data", pairs, "--scorers", "tests.help.judges:Dark", "--labels", "soft", "--rows-per-file", 8]
    assert labelled(capsys, *words, output=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        killed_once(patch, target, name, after)
        code, said = labelled(capsys, *words, output=tmp_path / "out")
        assert code == 130 and said.splitlines()[-1].endswith("the same command goes on from here")
    seen = Grey.seen
    assert labelled(capsys, *words, output=tmp_path / "out")[0] == 0
    assert left(tmp_path / "out") == left(tmp_path / "whole") and not list(tmp_path.rglob("*.part-*"))
    if name != "put":
        assert Grey.seen == seen + TRIED, "nothing was scored twice"
    code, said = labelled(capsys, *words, output=tmp_path / "out")
    assert code == 0 and "the labels are there already" in said


def test_a_file_that_is_gone_is_written_again(pairs, tmp_path, capsys):
    words = ["--data", pairs, *GREY, "--rows-per-file", 8]
    labelled(capsys, *words, output=tmp_path / "out")
    whole = left(tmp_path / "out")
    (tmp_path / "out" / "data" / "train-00001-of-00004.parquet").unlink()
    assert labelled(capsys, *words, output=tmp_path / "out")[0] == 0 and left(tmp_path / "out") == whole


def test_processes_share_the_scoring(pairs, tmp_path, capsys):
    words = ["--data", pairs, *GREY]
    labelled(capsys, *words, output=tmp_path / "whole")
    code, said = labelled(capsys, *words, "--shard", "0/2", output=tmp_path / "out")
    assert code == 0 and "this process has scored its part" in said and not (tmp_path / "out" / "data").exists()
    seen = Grey.seen
    assert labelled(capsys, *words, "--shard", "1/2", output=tmp_path / "out")[0] == 0
    assert left(tmp_path / "out") == left(tmp_path / "whole") and Grey.seen - seen < 40, "half of the images"


def test_parts_without_a_common_disk_are_merged(pairs, tmp_path, capsys):
    words = ["--data", pairs, *GREY]
    labelled(capsys, *words, output=tmp_path / "whole")
    for number in (0, 1):
        assert labelled(capsys, *words, "--shard", f"{number}/2", output=tmp_path / f"part-{number}")[0] == 0
    seen = Grey.seen
    code, said = labelled(capsys, *words, "--merge", tmp_path / "part-0", tmp_path / "part-1", output=tmp_path / "out")
    assert code == 0, said
    assert left(tmp_path / "out") == left(tmp_path / "whole") and Grey.seen == seen + TRIED
    code, said = labelled(capsys, *words, "--merge", tmp_path / "nothing", output=tmp_path / "other")
    assert code == 2 and "no scores are there" in said


def test_labels_made_otherwise_are_not_mixed_and_their_scores_are_kept(pairs, tmp_path, capsys):
    words = ["--data", pairs, "--scorers", "tests.help.judges:Dark"]
    labelled(capsys, *words, "--rows-per-file", 8, output=tmp_path / "out")
    code, said = labelled(capsys, *words, "--labels", "soft", output=tmp_path / "out")
    assert code == 2 and 'holds labels made otherwise (labels: "hard" there, "soft" now)' in said
    seen = Grey.seen
    code, said = labelled(capsys, *words, "--labels", "soft", "--overwrite", output=tmp_path / "out")
    assert code == 0 and Grey.seen == seen + TRIED
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["train-00000-of-00001.parquet"]
    other = worlds.make_pickapic(tmp_path / "other", 6)
    code, said = labelled(capsys, "--data", other, *words[2:], "--labels", "soft", output=tmp_path / "out")
    assert code == 2 and "holds labels of other pairs" in said
    code, said = labelled(
        capsys, "--data", other, *words[2:], "--labels", "soft", "--overwrite", output=tmp_path / "out"
    )
    assert code == 0 and len(rows(tmp_path / "out")) == 6


def test_a_scorer_that_changed_under_its_name_has_not_labelled_already(tmp_path, capsys, monkeypatch):
    words = ["--data", worlds.make_pickapic(tmp_path / "pairs", 4), *GREY]
    assert labelled(capsys, *words, output=tmp_path / "out")[0] == 0
    monkeypatch.setattr(Grey, "fingerprint", "grey 2")
    code, said = labelled(capsys, *words, output=tmp_path / "out")
    assert code == 2 and "holds labels by tests.help.judges:Grey as it was before: name another folder, or" in said
    assert labelled(capsys, *words, "--overwrite", output=tmp_path / "out")[0] == 0
    assert {row["scorer_fingerprint"] for row in rows(tmp_path / "out")} == {"grey 2"}
    code, said = labelled(capsys, *words, "--overwrite", output=tmp_path / "out")
    assert code == 0 and "the labels are there already" not in said, "made anew, whatever is there"


def test_a_temperature_of_other_pairs_is_not_there_already(pairs, tmp_path, capsys, monkeypatch):
    """The set's name is the same; how much of it is read, and what is in it, is not."""
    monkeypatch.setattr(work, "halves", lambda *given: None)
    monkeypatch.setattr(scale, "fitted", lambda *given: scale.Fit(2.0, 1, 1, -0.5, -0.5, -0.5))
    words = [images_of(tmp_path / "images", 3, 2), *GREY, "--fit-temperature", pairs]
    assert labelled(capsys, *words, output=tmp_path / "out")[0] == 0
    assert "the labels are there already" in labelled(capsys, *words, output=tmp_path / "out")[1]
    code, said = labelled(capsys, *words, "--max-pairs", 5, output=tmp_path / "out")
    assert code == 2 and "holds labels whose temperature was fitted on other pairs: name another folder" in said
    made = sets.read(tmp_path / "out")
    sets.write(tmp_path / "out", {name: value for name, value in made.items() if name not in ("fit", "sha256")})
    assert "the labels are there already" in labelled(capsys, *words, output=tmp_path / "out")[1], (
        "an earlier version's"
    )
    assert labelled(capsys, *words, "--max-pairs", 5, "--overwrite", output=tmp_path / "out")[0] == 0


def test_a_folder_without_labels_yet_takes_another_command(pairs, tmp_path, capsys):
    assert labelled(capsys, "--data", pairs, "--scorers", "tests.help.judges:Constant", output=tmp_path / "out")[0] == 2
    other = worlds.make_pickapic(tmp_path / "other", 6)
    assert (
        labelled(capsys, "--data", other, *GREY, output=tmp_path / "out")[0] == 0 and len(rows(tmp_path / "out")) == 6
    )


@pytest.mark.parametrize("name", ["data/train.parquet", "README.md", "label.json", "model_index.json", "images/a.png"])
def test_what_is_not_its_own_stays(pairs, tmp_path, capsys, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"somebody's")
    for more in ((), ("--overwrite",)):
        code, said = labelled(capsys, "--data", pairs, *GREY, *more, output=tmp_path / "out")
        assert code == 2 and name.split("/")[0] in said.splitlines()[-1] and len(said.splitlines()) == 1
    assert path.read_bytes() == b"somebody's" and not (tmp_path / "out" / "scores.sqlite").exists()


def test_a_strange_file_among_the_parquet_files_is_named(pairs, tmp_path, capsys):
    labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    shutil.copy(next((tmp_path / "out" / "data").iterdir()), tmp_path / "out" / "data" / "mine.parquet")
    code, said = labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    assert code == 2 and "holds mine.parquet, which python -m dpo.label did not make" in said


def test_images_that_cannot_be_scored_are_said_and_their_pairs_left_out(tmp_path, capsys):
    pairs = worlds.make_pickapic(tmp_path / "pairs", 6, broken=("truncated", "corrupt", "bomb", "empty"))
    code, said = labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    assert code == 0 and "4 of 20 images have no score" in said and len(rows(tmp_path / "out")) == 6
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["without_a_score"] == 4
    code, said = labelled(capsys, "--data", pairs, "--scorers", "tests.help.judges:Some", output=tmp_path / "some")
    assert code == 0 and "images have no score" in said and 0 < len(rows(tmp_path / "some")) <= 6
    code, said = labelled(capsys, "--data", pairs, "--scorers", "tiny-a", output=tmp_path / "none")
    assert code == 2 and said.splitlines()[-1].startswith("dpo.label: tiny-a gave no image a finite number")


def test_hostile_captions_are_text_on_the_page(tmp_path, capsys):
    table = worlds.make_table(tmp_path / "pairs", 4)
    found = [json.loads(line) for line in table.read_text().splitlines()]
    evil = "<script>alert(1)</script>\u202e\x07 [a](javascript:x) {{ 7 * 7 }}"
    table.write_text("".join(json.dumps({**row, "prompt": evil + str(i)}) + "\n" for i, row in enumerate(found)))
    code, said = labelled(capsys, "--data", table, *GREY, output=tmp_path / "out")
    assert code == 0, said
    page = Page((tmp_path / "out" / "pairs.html").read_text("utf-8"))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert all(ref.startswith("data:") for ref in page.refs)
    assert "script" not in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name what to label: --data PAIRS, or models"),
        (("--data", "PAIRS", "MODEL", *GREY), "one of the two"),
        (("--data", "PAIRS"), "nothing to label by"),
        (("--data", "PAIRS", "--scorers", "tiny-aa"), "there is no such scorer; did you mean tiny-a"),
        (("--data", "PAIRS", "--scorers", "tests.help.judges:OfSet"), "is of a whole set"),
        (("--data", "PAIRS", "--scorers", "tiny-diversity"), "is of a whole set"),
        (("--data", "PAIRS", "--scorers", "tests.help.judges:Constant"), "constant gives all 64 images the same score"),
        (("--data", "PAIRS", "--scorers", "tiny-a=0"), "with a weight above 0"),
        (("--data", "PAIRS", "--scorers", "tiny-a=nan"), "with a weight above 0"),
        (("--data", "PAIRS", "--scorers", "tiny-a=1", "tiny-a=2"), "a scorer is named twice"),
        (("--data", "PAIRS", *GREY, "--pairing", "all"), "--pairing is of images that models draw"),
        (("--data", "PAIRS", *GREY, "--seeds", "4"), "--seeds is of images that models draw"),
        (("--data", "PAIRS", *GREY, "--labels", "hard", "--temperature", "2"), "--labels hard have no temperature"),
        (("--data", "PAIRS", *GREY, "--temperature", "-1"), "not above 0"),
        (("--data", "PAIRS", *GREY, "--temperature", "1", "--fit-temperature"), "give one"),
        (("--data", "PAIRS", *GREY, "--margin", "inf"), "needs a number of at least 0"),
        (("--data", "PAIRS", *GREY, "--margin", "x"), "argument --margin"),
        (("--data", "PAIRS", *GREY, "--shard", "2/2"), "--shard 2/2: expected I/N"),
        (("--data", "PAIRS", *GREY, "--fit-temperature", "--max-pairs", "9"), "labelled pairs of different prompts"),
        (("--data", "nowhere", *GREY), "no such file or folder"),
        (("--data", "PAIRS", "--scores", "a=nowhere.csv"), "nowhere.csv is no file"),
        (("--data", "PAIRS", "--scores", "a"), "expected NAME=TABLE"),
        (("--data", "STORE", *GREY), "is a prepared store, which keeps no image files"),
        (("IMAGES", *GREY, "--split", "x"), "--split is of --data"),
        (("IMAGES", *GREY, "--subset", "2"), "--subset is of the drawing, and all sides are folders of images"),
        (("IMAGES", *GREY, "--prompts", "nowhere.txt"), "--prompts is of the drawing"),
        (("--data", "PAIRS", *GREY, "--temperature", "abc"), "argument --temperature: invalid number value: 'abc'"),
        (("IMAGES", *GREY, "--fit-temperature"), "images that models draw have no labels"),
        (("IMAGES", *GREY, "--min-margin", "2"), "with scores that differ by --min-margin 2: lower it, or draw more"),
        (("IMAGES", *GREY, "--pairs-per-prompt", "2"), "--pairs-per-prompt is of --pairing random"),
        (("IMAGES", "IMAGES", *GREY), "call"),
        (("nowhere/model", "--prompts", "a fox", *GREY), "nowhere/model"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(pairs, tmp_path, capsys, words, said):
    places = {"PAIRS": pairs}
    if "IMAGES" in words:
        places["IMAGES"] = images_of(tmp_path / "images", 3, 2)
    if "STORE" in words:
        from dpo.data.store import fill
        from tests.help.stores import Encoders, Synthetic, task

        fill.fill(task(tmp_path / "store", Synthetic(6), Encoders()))
        places["STORE"] = tmp_path / "store"
    code, errors = labelled(capsys, *(places.get(word, word) for word in words), output=tmp_path / "out")
    lines = [line for line in errors.splitlines() if line.startswith("dpo.label: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in errors, errors


def test_labels_do_not_come_into_the_folder_of_the_pairs(tmp_path, capsys):
    pairs = worlds.make_pickapic(tmp_path / "pairs", 4)
    code, said = labelled(capsys, "--data", pairs, *GREY, output=pairs / "labels")
    assert code == 2 and "lies in the folder of the pairs" in said


def test_labels_do_not_replace_the_pairs_that_they_are_made_of(tmp_path, capsys):
    """Else --overwrite would delete them before they are read."""
    pairs, out = worlds.make_pickapic(tmp_path / "pairs", 4), tmp_path / "out"
    assert labelled(capsys, "--data", pairs, *GREY, output=out)[0] == 0
    before = left(out)
    for place in (
        out / "data",
        out / "data" / "*.parquet",
        tmp_path / "o?t" / "data" / "*",
        next(out.glob("data/*")),
    ):
        for given in (("--data", place), ("--data", pairs, "--fit-temperature", place)):
            code, said = labelled(capsys, *given, "--scorers", "tests.help.judges:Dark", "--overwrite", output=out)
            assert code == 2 and f"--output {out} holds the pairs, {place}: name" in said and left(out) == before


def test_an_altered_label_json_is_named(pairs, tmp_path, capsys):
    labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    path = tmp_path / "out" / "label.json"
    path.write_text(path.read_text().replace('"pairs": 32', '"pairs": 31'))
    code, said = labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    assert code == 2 and "was changed, or is of another version" in said


def test_help_needs_no_torch_and_names_every_flag():
    import subprocess
    import sys

    code = (
        "import sys; from dpo.label import make_parser; make_parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scores_lie_in_one_cache_by_content_and_caption(pairs, tmp_path, capsys):
    labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "out" / "scores.sqlite")) as base:
        (count,) = base.execute("SELECT count(*) FROM scores").fetchone()
    distinct = {(row[f"jpg_{side}"], row["caption"]) for row in rows(pairs) for side in (0, 1)}
    assert count == len(distinct) < 2 * 32


def test_the_files_say_of_which_protocol_they_are(pairs, tmp_path, capsys):
    labelled(capsys, "--data", pairs, *GREY, output=tmp_path / "out")
    mark = sets.read(tmp_path / "out")["protocol"]
    assert {row["protocol"] for row in rows(tmp_path / "out")} == {mark}
    path = next((tmp_path / "out" / "data").iterdir())
    assert pq.read_metadata(path).metadata[b"dpo.label"] == mark.encode()


@pytest.mark.parametrize("words", [["--scorers", "help"], ["--scorer", "help"], ["--scorers=help"]])
def test_help_of_scorers_lists_them(words, capsys):
    assert label.main(["--data", "x", *words]) == 0 and "pickscore" in capsys.readouterr().out

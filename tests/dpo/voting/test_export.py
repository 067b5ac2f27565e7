"""Votes as preference pairs: labels, shares, and the images as they are."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dpo.common.errors import UserError
from dpo.data.sources import open_source
from dpo.settings.config import Data
from dpo.voting import export, study
from dpo.voting.answers import FILE, Answer, Journal
from tests.help.votes import make_study

VOTES = ("first first second", "tie", "first second", "second second tie second", "", "first first first")


@pytest.fixture
def folder(tmp_path):
    """Six pairs of images with votes of known counts, an answer to a check, a repeat, and another question."""
    place = tmp_path / "study"
    declared = make_study(place, prompts=6, checks=0.05)
    swapped = replace(declared.items[0], sides=declared.items[0].sides[::-1])  # its first image is the later model's
    study.write(place, replace(declared, items=(swapped, *declared.items[1:])))
    items = [item for item in declared.items if item.kind == "vote"]
    check = next(item for item in declared.items if item.kind == "broken")
    with Journal(place) as journal:

        def add(item, rater, choice, question=declared.questions[0].key, repeat=False):
            name = f"{len(journal.lines):032x}"
            journal.add(Answer(name, rater, item.id, question, choice, 0, repeat, 2.0, "2026-01-01T00:00:00Z"))

        for item, choices in zip(items, VOTES, strict=True):
            for number, choice in enumerate(choices.split()):
                add(item, f"rater {number}", choice)
        add(items[0], "rater 0", "second", repeat=True)
        add(items[4], "rater 0", "second", question=declared.questions[1].key)
        add(items[4], "blind", "first")
        add(check, "blind", "first" if check.sides[0] < 0 else "second")  # takes the broken image for the better one
    return place


def test_labels_are_the_majoritys_and_p_is_the_share_of_the_votes(folder, tmp_path):
    declared = study.read(folder)
    said = export.write(folder, tmp_path / "pairs.parquet")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert [(row["label_0"], row["label_1"]) for row in rows] == [(1, 0), (0.5, 0.5), (0.5, 0.5), (0, 1), (1, 0)]
    assert [row["p"] for row in rows] == pytest.approx([2 / 3, 0.5, 0.5, 1 / 8, 1.0])
    assert [(row["votes"], row["ties"]) for row in rows] == [(3, 0), (1, 1), (2, 0), (4, 1), (3, 0)]
    items = [item for item, choices in zip(declared.items, VOTES, strict=False) if choices]
    assert {row["model_0"] for row in rows} == {"basemodel", "newmodel"}
    for row, item in zip(rows, items, strict=True):
        assert (row["caption"], row["image_0_uid"], row["image_1_uid"]) == (item.prompt, *item.hashes)
        assert [row["jpg_0"], row["jpg_1"]] == [Path(path).read_bytes() for path in item.images]
        assert (row["model_0"], row["model_1"]) == tuple(declared.sides[side] for side in item.sides)
    assert said == [
        f"{tmp_path / 'pairs.parquet'}: 5 pairs from 13 votes on general, 2 of them ties; dpo.train takes them as --data "
        f"{tmp_path / 'pairs.parquet'}",
        "left out by the study's rule: 1 of 5 raters",
    ]


def test_another_question_and_layout_into_a_folder(folder, tmp_path):
    export.write(folder, tmp_path / "out", "appeal", layout="chosen-rejected")
    (row,) = pq.read_table(tmp_path / "out" / "votes.parquet").to_pylist()
    item = study.read(folder).items[4]
    assert (row["prompt"], row["p"], row["question"]) == (item.prompt, 1.0, "appeal")
    assert row["chosen"] == Path(item.images[1]).read_bytes()


def test_only_an_export_of_the_same_study_is_replaced(folder, tmp_path):
    path = tmp_path / "pairs.parquet"
    export.write(folder, path)
    export.write(folder, path, "appeal", layout="chosen-rejected")
    assert pq.read_metadata(path).num_rows == 1
    declared = study.read(folder)
    study.write(folder, replace(declared, items=tuple(replace(item, id=item.id[::-1]) for item in declared.items)))
    for own in (path.read_bytes(), b"my own pairs"):
        path.write_bytes(own)
        with pytest.raises(
            UserError, match=r"pairs\.parquet is there already, and no export of this study: .* name another"
        ):
            export.write(folder, path)
        assert path.read_bytes() == own


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_the_trainer_reads_them(folder, tmp_path, layout):
    """Ties are dropped unless they are asked for, and the share of the votes is the probability of a preference."""
    export.write(folder, tmp_path / "pairs.parquet", layout=layout)
    source = open_source(Data(data=str(tmp_path / "pairs.parquet"), ties="keep", validation_fraction=0.0))
    assert len(source) == 5
    assert source.prob.tolist() == pytest.approx([2 / 3, 0.5, 0.5, 7 / 8, 1.0]), "of the image that was preferred"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"question": "beauty"}, "the study asks general, appeal, alignment"), ({"layout": "csv"}, "--layout csv: there are pickapic"),
     ({"question": "alignment"}, "has no vote on alignment that counts")],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused(folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        export.write(folder, tmp_path / "pairs.parquet", **options)
    assert not (tmp_path / "pairs.parquet").exists()


def test_images_that_were_changed_since_are_no_pair(folder, tmp_path):
    item = study.read(folder).items[0]
    Path(item.images[0]).write_bytes(Path(item.images[1]).read_bytes())
    with pytest.raises(UserError, match="is not the image that people voted on"):
        export.write(folder, tmp_path / "pairs.parquet")
    assert list(tmp_path.glob("*.parquet")) == [] and (folder / FILE).is_file()

"""From folders to a study: which pairs, which prompts, and what is said about them."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.evaluating.flags import Named
from dpo.voting import study
from dpo.voting.declare import Wanted, check_same, declare
from dpo.voting.presets import PRESETS
from dpo.voting.shown import load
from dpo.voting.study import Question, Rule
from tests.help.votes import make_folder

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


@pytest.fixture
def sides(tmp_path):
    """Three folders of twelve prompts."""
    named = (("base", RED), ("new", GREEN), ("other", BLUE))
    return tuple(Named(name, str(make_folder(tmp_path / name, 12, colour))) for name, colour in named)


def made(tmp_path, sides, **wanted):
    folder = tmp_path / "study"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return declare(folder, Wanted(sides=sides, **wanted))


def votes(found):
    return [item for item in found.items if item.kind == "vote"]


def test_two_folders_become_a_study(tmp_path, sides):
    found = made(tmp_path, sides[:2])
    assert study.read(tmp_path / "study") == found
    assert found.sides == ("base", "new") and found.votes == 5 and found.tie and found.repeats == 0.05
    assert [question.key for question in found.questions] == ["general", "appeal", "alignment"]
    assert len(votes(found)) == 12 and {item.sides for item in votes(found)} == {(0, 1)}
    assert Counter(item.kind for item in found.items) == {"vote": 12, "broken": 2, "same": 2}
    for item in found.items:
        assert tuple(pixel_hash(load(tmp_path / "study" / image)) for image in item.images) == item.hashes
        if item.kind == "vote":
            assert [Path(image).parent.name for image in item.images] == ["base", "new"]
            assert Path(item.images[0]).name == Path(item.images[1]).name
    assert len({item.id for item in found.items}) == 16 and {item.category for item in found.items} == {"even", "odd"}
    assert "12 prompts, 12 pairs of images" in found.note


def test_several_sides_are_compared_in_all_pairs_or_with_the_base(tmp_path, sides, caplog):
    with caplog.at_level(logging.INFO, "dpo"):
        found = made(tmp_path, sides)
    assert Counter(item.sides for item in votes(found)) == {(0, 1): 12, (0, 2): 12, (1, 2): 12}
    assert "all pairs of sides: 3 a prompt" in found.note and "all pairs of sides" in caplog.text
    found = made(tmp_path, sides, against_base=True)
    assert Counter(item.sides for item in votes(found)) == {(0, 1): 12, (0, 2): 12}
    assert "pairs with the base alone: 2 a prompt" in found.note


def test_prompts_that_a_side_lacks_are_left_out_of_all(tmp_path, sides):
    table = tmp_path / "other" / "prompts.tsv"
    table.write_text("\n".join(table.read_text("utf-8").splitlines()[:-2]), "utf-8")
    found = made(tmp_path, sides)
    assert Counter(item.sides for item in votes(found)) == {(0, 1): 10, (0, 2): 10, (1, 2): 10}
    assert "2 prompts that not all sides have are left out" in found.note


def test_subsets_are_keyed_and_said(tmp_path, sides):
    def prompts(**wanted):
        return {item.prompt for item in votes(made(tmp_path, sides[:2], **wanted))}

    some = prompts(subset=5)
    assert len(some) == 5 == len(prompts(subset=5, seed=1)) and prompts(subset=5) == some != prompts(subset=5, seed=1)
    assert some < prompts(subset=6)  # the same prompts, and one more
    found = made(tmp_path, sides[:2], each=3)
    assert Counter(item.category for item in votes(found)) == {"even": 3, "odd": 3}
    assert "3 prompts of each category, keyed with seed 0: even, odd" in found.note
    assert "5 of 12 prompts, keyed with seed 0" in made(tmp_path, sides[:2], subset=5).note
    for wanted, line in (
        ({"each": 7}, "--each 7: even has 6 prompts"),
        ({"subset": 13}, "--subset 13: of 12 prompts choose"),
    ):
        with pytest.raises(UserError, match=line):
            prompts(**wanted)
    for side in sides:
        table = Path(side.place) / "prompts.tsv"
        table.write_text("\n".join(line.rpartition("\t")[0] for line in table.read_text("utf-8").splitlines()), "utf-8")
    with pytest.raises(UserError, match="--each 2: these prompts have no categories"):
        prompts(each=2)


def test_one_pair_of_a_prompt_unless_more_are_asked_for(tmp_path, sides):
    for side in sides:
        table = Path(side.place) / "prompts.tsv"
        rows = [line.split("\t") for line in table.read_text("utf-8").splitlines()]
        table.write_text(
            "\n".join("\t".join([row[0], f"prompt {n // 3}" if n else row[1]]) for n, row in enumerate(rows)), "utf-8"
        )
    assert len(votes(made(tmp_path, sides[:2]))) == 5  # of 12 images of 5 prompts
    found = made(tmp_path, sides[:2], per_prompt=2)
    assert len(votes(found)) == 9 and len({item.id for item in found.items}) == len(found.items)
    assert "3 further pairs of the same prompts are left out (--per-prompt 2)" in found.note


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_study(tmp_path, sides, name, monkeypatch):
    preset = PRESETS[name]
    found = made(tmp_path, sides[:2], preset=name)
    assert (found.questions, found.tie, found.votes, found.title) == (preset.questions, False, 5, preset.title)
    assert f"--study {name}: 12 prompts, where the published studies had {next(iter(preset.published))}" in found.note
    monkeypatch.setitem(preset.published, 12, "a dozen")
    assert f"--study {name}: 12 prompts, a dozen" in made(tmp_path, sides[:2], preset=name).note
    own = made(tmp_path, sides[:2], preset=name, tie=True, votes=3, questions=(Question("q1", "Why?"),), title="T")
    assert (own.questions, own.tie, own.votes, own.title) == ((Question("q1", "Why?"),), True, 3, "T")


def test_what_the_published_studies_asked():
    assert [len(PRESETS[name].questions) for name in ("dpo", "versus")] == [3, 1]
    assert set(PRESETS["dpo"].published) == {1632, 3200, 800} and set(PRESETS["versus"].published) == {346, 200}


def test_images_that_cannot_be_read_take_their_pair_along(tmp_path, sides, caplog):
    (tmp_path / "new" / "3.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, "dpo"):
        found = made(tmp_path, sides[:2])
    assert len(votes(found)) == 11 and "1 of 12 pairs is left out: an image cannot be read" in found.note
    assert "1 of 24 images cannot be read, the first is" in caplog.text
    for number in range(12):
        (tmp_path / "new" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no pair of images can be shown"):
        made(tmp_path, sides[:2])


def test_pairs_of_one_image_are_said(tmp_path, sides):
    shutil.copy(tmp_path / "base" / "3.png", tmp_path / "new" / "3.png")
    assert "1 of 12 pairs is twice the same image" in made(tmp_path, sides[:2]).note


def test_the_output_of_an_evaluation(tmp_path, sides):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    entries = [{"name": side.name, "place": side.place} for side in sides[:2]]
    (folder / "evaluation.json").write_text(json.dumps({"sides": entries}), "utf-8")
    found = made(tmp_path, (Named("evaluation", str(folder)),))
    assert found.sides == ("base", "new") and len(votes(found)) == 12
    moved = folder / "images" / "new"
    moved.parent.mkdir()
    shutil.move(tmp_path / "new", moved)
    assert "evaluation/images/new" in Path(votes(made(tmp_path, (Named("e", str(folder)),)))[0].images[1]).as_posix()
    shutil.move(moved, tmp_path / "away")
    with pytest.raises(
        UserError, match=r"evaluation\.json has the images of new in .*new, which is not there: start this where"
    ):
        made(tmp_path, (Named("e", str(folder)),))
    for text in ("{}", '{"sides": [1]}', "["):
        (folder / "evaluation.json").write_text(text, "utf-8")
        with pytest.raises(UserError, match=r"evaluation\.json: cannot be read"):
            made(tmp_path, (Named("e", str(folder)),))


def test_mistakes_are_one_line(tmp_path, sides):
    empty = tmp_path / "empty"
    empty.mkdir()
    base = sides[0]
    cases = [
        ((base, Named("base", sides[1].place)), "two sides are called base"),
        (
            (base, Named("x", str(tmp_path / "none"))),
            r"none: no folder is there; draw its images with python -m dpo\.sample",
        ),
        ((base, Named("x", str(empty))), "empty holds no images; draw some"),
        ((Named("x", str(empty)),), r"empty is no study \(no study\.json\) and no output of dpo\.evaluate"),
    ]
    for wanted, line in cases:
        with pytest.raises(UserError, match=line) as error:
            made(tmp_path, wanted)
        assert "\n" not in str(error.value)
    table = Path(sides[1].place) / "prompts.tsv"
    table.write_text(table.read_text("utf-8").replace("prompt number", "another"), "utf-8")
    with pytest.raises(UserError, match="have no prompt in common"):
        made(tmp_path, sides[:2])
    (tmp_path / "base" / "study.txt").write_text("", "utf-8")
    with pytest.raises(UserError, match="holds other files"):
        declare(tmp_path / "base", Wanted(sides=sides[:2]))


def test_a_declaration_that_was_killed_is_made_anew(tmp_path, sides):
    found = made(tmp_path, sides[:2])
    (tmp_path / "study" / "study.json").unlink()
    (tmp_path / "study" / "checks" / "left.png").write_bytes(b"")
    (tmp_path / "study" / ".study.json.part-0").write_bytes(b"")
    assert declare(tmp_path / "study", Wanted(sides=sides[:2])) == found
    assert not (tmp_path / "study" / "checks" / "left.png").exists()


def test_a_folder_checks_that_is_no_studys_stays(tmp_path, sides):
    """Only the secret tells that a declaration was begun there."""
    mine = tmp_path / "work" / "checks" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", "utf-8")
    with pytest.raises(UserError, match=r"holds other files \(checks\): name a new folder"):
        declare(tmp_path / "work", Wanted(sides=sides[:2]))
    assert mine.read_text("utf-8") == "mine"


def test_no_checks_where_none_are_wanted(tmp_path, sides):
    found = made(tmp_path, sides[:2], checks=0.0)
    assert {item.kind for item in found.items} == {"vote"} and not (tmp_path / "study" / "checks").exists()


def test_settings_are_fixed_and_what_differs_is_named(tmp_path, sides):
    wanted = Wanted(sides=sides[:2])
    found = made(tmp_path, sides[:2])
    assert check_same(tmp_path / "study", wanted) == found
    others = {
        "sides": Wanted(sides=sides), "--votes": Wanted(sides=sides[:2], votes=3), "--seed": Wanted(sides=sides[:2], seed=1),
        "--study": Wanted(sides=sides[:2], preset="dpo"), "--rule": Wanted(sides=sides[:2], rule=Rule(broken=0.5)),
        "--questions": Wanted(sides=sides[:2], questions=(Question("a", "A?"),)), "--tie": Wanted(sides=sides[:2], tie=False),
        "--subset": Wanted(sides=sides[:2], subset=3), "--notice": Wanted(sides=sides[:2], notice="N"),
    }  # fmt: skip
    for flag, other in others.items():
        with pytest.raises(UserError, match=rf"declared with {flag} .*, not .*python -m dpo\.vote") as error:
            check_same(tmp_path / "study", other)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

"""Scorers beside the people: preferences from an evaluation's folder and from tables, and how often they agree."""

import json

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.scorers.cache import ScoreCache
from dpo.voting import study, trust
from dpo.voting.answers import Answer
from tests.help import simulated
from tests.help.votes import make_study


def answers(declared, likes):
    """Three votes on each item of kind "vote": for the later model where `likes` says so."""
    items = [item for item in declared.items if item.kind == "vote"]
    return [
        Answer(f"{item.id}{n}", f"rater {n}", item.id, declared.questions[0].key, choice, 0, False, 2.0, "2026-01-01")
        for item, later in zip(items, likes, strict=True)
        for choice in ["second" if later == (item.sides[1] > item.sides[0]) else "first"]
        for n in range(3)
    ]


def said(declared, scorer, later):
    full = np.full(len(declared.items), np.nan)
    full[: len(later)] = later
    return trust.Judged(scorer, full)


def test_agreement_by_hand():
    """Of six items one is a tie to the scorer and one has no score; of the other four it says three as people do."""
    declared = simulated.study(6)
    given = answers(declared, [True, True, True, False, False, True])
    (one,) = trust.agreement(declared, given, "general", [said(declared, "s", [1, 1, -1, -1, 0, np.nan])])
    assert (one["majority"], one["votes"], one["items"], one["prompts"], one["left_out"]) == (0.75, 0.75, 4, 4, 2)
    assert one["interval"][0] < 0.75 < one["interval"][1] and one["behind"] is None and one["level"]


def test_majority_and_votes_are_two_figures():
    """Two of three say so on each item: the scorer agrees with all majorities and with two thirds of the votes."""
    declared = simulated.study(8)
    given = answers(declared, [True] * 8)
    for number in range(0, len(given), 3):
        other = "first" if given[number].choice == "second" else "second"
        given[number] = Answer(**{**given[number].__dict__, "choice": other})
    (one,) = trust.agreement(declared, given, "general", [said(declared, "s", [1] * 8)])
    assert one["majority"] == 1.0 and one["votes"] == pytest.approx(2 / 3)


def test_the_first_is_the_best_and_who_may_be_as_good_is_said():
    declared = simulated.study(60)
    likes = np.random.default_rng(0).random(60) < 0.6
    given = answers(declared, likes.tolist())
    truth = np.where(likes, 1.0, -1.0)
    near, far = truth.copy(), -truth
    near[:1] *= -1
    scorers = [said(declared, "far", far), said(declared, "near", near), said(declared, "same", truth)]
    found = trust.agreement(declared, given, "general", scorers)
    assert [one["scorer"] for one in found] == ["same", "near", "far"]
    assert [one["level"] for one in found] == [True, True, False]
    assert found[2]["behind"] == pytest.approx((1.0, 1.0)) and found[1]["behind"][0] <= 0 < found[1]["behind"][1]


def test_raters_who_are_left_out_do_not_count_and_nothing_is_said_of_nothing():
    declared = simulated.study(6)
    given = answers(declared, [True] * 6)
    without = {f"rater {n}" for n in range(3)}
    assert trust.agreement(declared, given, "general", [said(declared, "s", [1] * 6)], without) == []
    assert trust.agreement(declared, given, "general", [said(declared, "s", [0] * 6)]) == []


@pytest.fixture
def folder(tmp_path):
    make_study(tmp_path / "study", prompts=6, checks=0.0)
    return tmp_path / "study"


def evaluation(folder, declared, **fields):
    """The folder of an evaluation whose scorer likes the model of each even item."""
    place = folder.parent / "evaluation"
    place.mkdir()
    scorer = {"name": "pick", "fingerprint": "f00d", **fields}
    text = {"scorers": [scorer, {"name": "of-a-table", "fingerprint": "table x.csv"}]}
    (place / "evaluation.json").write_text(json.dumps(text))
    with ScoreCache(place / "scores.sqlite") as cache:
        for number, item in enumerate(declared.items):
            cache.put(
                "f00d", [(item.hashes[0], item.prompt, 1.0), (item.hashes[1], item.prompt, 1.5 if number % 2 else 0.0)]
            )
    return place


def test_an_evaluations_scores_are_found_by_pixels(folder):
    declared = study.read(folder)
    (found,) = trust.judged(declared, folder, [str(evaluation(folder, declared))])
    order = np.array([1 if item.sides == (0, 1) else -1 for item in declared.items])
    assert found.scorer == "pick"
    assert found.later.tolist() == (np.where(np.arange(6) % 2, 1.0, -1.0) * order).tolist()


@pytest.mark.parametrize(("fields", "expected"), [({"higher_is_better": False}, -1.0), ({"resolution": 0.6}, 0.0)])
def test_a_scorers_direction_and_resolution_hold(folder, fields, expected):
    declared = study.read(folder)
    (found,) = trust.judged(declared, folder, [str(evaluation(folder, declared, **fields))])
    assert found.later[1] * (1 if declared.items[1].sides == (0, 1) else -1) == expected


def test_a_table_by_file_name(folder):
    declared = study.read(folder)
    table = folder.parent / "scores.csv"
    rows = [f"{path},{side}" for item in declared.items for path, side in zip(item.images, item.sides, strict=True)]
    table.write_text("file,score\n" + "\n".join(rows[:-2]))
    (found,) = trust.judged(declared, folder, [f"mine={table}"])
    assert found.scorer == "mine" and found.later[:-1].tolist() == [1.0] * 5 and np.isnan(found.later[-1])


def test_a_table_of_bare_names_that_both_sides_have_is_refused(folder):
    table = folder.parent / "scores.csv"
    table.write_text("file,score\n" + "".join(f"{number}.png,{number}\n" for number in range(6)))
    with pytest.raises(
        UserError, match=r"row 1 of .* names 0.png, which is an image of .*basemodel.* and of .*newmodel"
    ):
        trust.judged(study.read(folder), folder, [f"mine={table}"])


def test_a_preference_is_for_a_model_whichever_image_comes_first(tmp_path):
    declared = simulated.study(4)
    table = tmp_path / "scores.csv"
    table.write_text("file,score\n" + "".join(f"a{n}.png,0\nb{n}.png,1\n" for n in range(4)))
    (found,) = trust.judged(declared, tmp_path, [f"mine={table}"])
    assert [item.sides for item in declared.items] == [(1, 0), (0, 1)] * 2
    assert found.later.tolist() == [-1.0, 1.0] * 2


def test_what_holds_no_scores_is_refused(folder, tmp_path):
    declared = study.read(folder)
    place = evaluation(folder, declared)
    for texts, words in (
        ([str(tmp_path)], "holds no evaluation.json"),
        (["nowhere"], "expected the folder of an evaluation, or NAME=TABLE"),
        ([str(place), str(place)], "two scorers are called pick"),
        ([f"a={tmp_path / 'gone.csv'}"], "gone.csv"),
    ):
        with pytest.raises(UserError, match=words):
            trust.judged(declared, folder, texts)
    (place / "evaluation.json").write_text('{"scorers": [{}]}')
    with pytest.raises(UserError, match="run python -m dpo.evaluate again"):
        trust.judged(declared, folder, [str(place)])
    (place / "evaluation.json").write_text('{"scorers": [{"name": "b", "fingerprint": "another"}]}')
    with pytest.raises(UserError, match="scored none of the study's images"):
        trust.judged(declared, folder, [str(place)])

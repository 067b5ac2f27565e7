"""dpo.pages.kept: with --keep-best pages show the accuracy and the images of the weights that are the result."""

import pytest

from dpo.pages.kept import grids, kept, kept_update, sentences, validation
from tests.help.fake_run import run_of

CHOICE = {
    "step": 40,
    "of": 120,
    "early": True,
    "heldout_accuracy": 0.625,
    "choosing_accuracy": 0.75,
    "choosing_pairs": 64,
}


@pytest.fixture
def run():
    return run_of("good")


def test_without_a_choice_the_last_is_the_result(run):
    assert kept(run) == {} and kept_update(run) is None and sentences(run) == []
    assert validation(run) == run.validations[-1] and grids(run) == run.grids
    assert validation(run._replace(events=[])) is None


def test_the_kept_updates_accuracy_and_images_are_those_of_the_result(run):
    early = run.validations[1]["step"]
    paths = [run.folder / "samples" / f"step-{step:08d}.png" for step in (early, early + 1)]
    chosen = run._replace(summary={**run.summary, "kept": {**CHOICE, "step": early}}, grids=paths)
    assert validation(chosen)["heldout_accuracy"] == 0.625 != run.validations[-1]["heldout_accuracy"]
    assert validation(chosen._replace(events=[])) == validation(chosen), "where its own record is in another folder"
    assert grids(chosen) == paths[::-1]
    (said,) = sentences(chosen)
    assert f"update {early} of 120" in said and "75% of 64" in said and "ended early" in said


def test_a_choice_that_does_not_say_all_is_none(run):
    damaged = run._replace(summary={**run.summary, "kept": {"step": 40}})
    assert kept(damaged) == {} and validation(damaged) == run.validations[-1]

"""dpo.pages.single: what pages say where a run was trained on images without partners."""

import pytest

from dpo.pages.card import model_card
from dpo.pages.single import HELD_LIKED, LIKED, guessing, is_single, things, told_guessing
from dpo.pages.verdict import held_out, verdict
from tests.help.fake_run import run_of


@pytest.fixture
def run():
    return run_of("good")


def of_images(run, held_liked: int, held: int = 100):
    data = run.summary.get("data", {}) | {LIKED: 700, "held out": held, HELD_LIKED: held_liked}
    return run._replace(summary=run.summary | {"data": data})


def test_of_pairs_nothing_changes(run):
    assert not is_single(run) and things(run) == "pairs" and guessing(run) == 0.5
    assert told_guessing(run) == "guessing gives 50%" and "pairs that it never trained on" in " ".join(
        verdict(run).sentences
    )


@pytest.mark.parametrize(("liked", "told"), [(60, "60%"), (30, "70%"), (50, "50%")])
def test_guessing_is_naming_the_commoner_label(run, liked, told):
    said = verdict(alone := of_images(run, liked)).sentences
    assert is_single(alone) and told_guessing(alone) == f"naming the commoner label gives {told}"
    assert any(
        "images that it never trained on" in one and "gains more than the mean on an image that is liked" in one
        for one in said
    )
    assert not any("pairs" in one for one in said)


def test_an_accuracy_that_the_commoner_label_reaches_shows_nothing(run):
    found = held_out(run)
    assert found.above and verdict(run).level == "good"
    share = round(100 * found.share)
    alone = of_images(run, share)._replace(events=run.events)
    alone = alone._replace(summary={k: v for k, v in alone.summary.items() if k != "evaluation"})
    assert not held_out(alone).above and verdict(alone).headline == "No effect can be shown."
    assert f"not above the {share}% that naming the commoner label gives" in " ".join(verdict(alone).sentences)


def test_the_card_says_what_the_labels_were_of(run):
    assert "aligned with the labels of the images in" in model_card(of_images(run, 50))


def test_pairs_that_are_held_out_of_a_run_on_images_are_called_so(run):
    data = run.summary.get("data", {}) | {LIKED: 700, "held out": 100}
    said = verdict(run._replace(summary=run.summary | {"data": data})).sentences
    assert any("pairs that it never trained on" in one and "sides with the preferred image" in one for one in said)
    assert any("guessing gives 50%" in one for one in said) and "images" in said[0]

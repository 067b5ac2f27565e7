"""dpo.pages.single: what pages say where a run was trained on images without partners."""

import pytest
from matplotlib.figure import Figure

from dpo.pages.card import model_card
from dpo.pages.charts import charts
from dpo.pages.figures import progress_fields
from dpo.pages.single import HELD_LIKED, LIKED, guessing, is_single, things, told_guessing, trained_guessing
from dpo.pages.verdict import held_out, verdict
from tests.help.fake_run import run_of


@pytest.fixture
def run():
    return run_of("good")


def of_images(run, held_liked: int, held: int = 100, *, balanced: bool = False):
    data = run.summary.get("data", {}) | {"usable": 1000, LIKED: 700, "held out": held, HELD_LIKED: held_liked}
    events = [event | ({"heldout_balanced": True} if balanced else {}) for event in run.events]
    return run._replace(summary=run.summary | {"data": data}, events=events)


def test_of_pairs_nothing_changes(run):
    assert not is_single(run) and things(run) == "pairs" and guessing(run) == 0.5
    assert told_guessing(run) == "guessing gives 50%" and "pairs that it never trained on" in " ".join(
        verdict(run).sentences
    )


def test_a_balanced_accuracy_is_compared_with_one_half_whatever_the_labels(run):
    alone = of_images(run, 90, balanced=True)
    assert guessing(alone) == 0.5 and told_guessing(alone) == "one label for all gives 50%"
    assert any("as the mean of both labels; one label for all gives 50%" in one for one in verdict(alone).sentences)
    assert trained_guessing(alone) == 0.7 and trained_guessing(run) == 0.5


def test_charts_speak_of_images_and_draw_what_an_answer_without_looking_gives(run):
    alone = of_images(run, 90, balanced=True)
    drawn = {chart.key: chart for chart in charts(alone)}
    assert not [key for key, chart in drawn.items() if "pair" in chart.meaning]
    for chart, of, levels in ((drawn["accuracy"], alone, {0.5, 0.7}), (charts(run)[1], run, {0.5})):
        axes = Figure().subplots()
        chart.draw(axes, of)
        lines = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
        assert {float(y[0]) for y in lines if len(set(y)) == 1 and len(y) == 2} == levels


def test_the_progress_line_counts_images():
    assert progress_fields({"pairs_per_s": 12.34}, "images") == ["12.3 images/s"]


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

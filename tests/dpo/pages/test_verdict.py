"""dpo.pages.verdict: each kind of run gets the judgement and the warnings that a person should read."""

import pytest

from dpo.data import held_out as held_out_pairs
from dpo.pages.folder import SHARED
from dpo.pages.verdict import ENOUGH_TO_SHARE, held_out, verdict, warnings, win_rate
from tests.help.fake_run import KINDS, run_of


@pytest.fixture
def runs():
    return {kind: run_of(kind) for kind in KINDS}


def titles(run):
    return [warning.title for warning in warnings(run)]


def with_late(run, **figures):
    """The run with these figures in every update."""
    return run._replace(updates=[{**update, **figures} for update in run.updates])


def with_held_out(run, share, pairs):
    return run._replace(events=[{"event": "validation", "step": 60, "heldout_accuracy": share, "heldout_pairs": pairs}])


def with_setting(run, group, **values):
    return run._replace(settings={**run.settings, group: {**run.settings[group], **values}})


@pytest.mark.parametrize(
    ("kind", "level", "headline"),
    [
        ("good", "good", "It worked"),
        ("dde", "good", "It worked"),
        ("lora-gpu", "good", "It worked"),
        ("early", "early", "Too early"),
        ("failed", "poor", "stopped with an error"),
        ("sft", "early", "not measured"),
        ("over", "mixed", "at a price: faithfulness fell from 99% to 62%"),
        ("flat", "poor", "No effect can be shown"),
    ],
)
def test_verdicts(runs, kind, level, headline):
    found = verdict(runs[kind])
    assert found.level == level and headline in found.headline


def test_a_good_run_gives_no_warning(runs):
    assert titles(runs["good"]) == [] and titles(runs["lora-gpu"]) == []


def test_the_sentences_carry_the_figures(runs):
    text = " ".join(verdict(runs["good"]).sentences)
    assert (
        "256 pairs" in text
        and "63% (57% to 69%)" in text
        and "82% of 208 cases" in text
        and "97% of the images" in text
    )


def test_what_held_out_pairs_share_with_training_pairs_is_said(runs):
    words = " pairs that it never trained on (captions or images of theirs may be in pairs that it did train on), the"
    run = with_held_out(runs["good"], 0.7, 50)
    alone = with_setting(run, "data", validation_fraction=0.2, validation_by="pair", validation_data=None)
    counted = run._replace(summary={**run.summary, "data": {**run.summary.get("data", {}), SHARED: 3}})
    assert all(words in " ".join(verdict(one).sentences) for one in (alone, counted))
    assert "never trained on, the model" in " ".join(verdict(run).sentences)
    named = with_setting(run, "data", validation_fraction=0.0, validation_by="pair")
    assert "never trained on, the model" in " ".join(verdict(named).sentences)


def test_evidence_is_the_last_measurement(runs):
    assert held_out(runs["good"]).share == pytest.approx(0.633, abs=0.001)
    assert win_rate(runs["good"]).low > 0.75 and win_rate(runs["lora-gpu"]) is None


def test_moving_the_wrong_way_is_said(runs):
    run = with_held_out(runs["good"], 0.35, 256)
    assert verdict(run).level == "poor" and "away from the preferred" in verdict(run).headline


def test_held_out_near_one_half_is_no_success(runs):
    run = with_held_out(runs["lora-gpu"], 0.53, 256)
    assert verdict(run).level == "poor" and "includes one half" in verdict(run).sentences[-1]


def test_training_accuracy_alone_is_not_success(runs):
    run = with_late(runs["lora-gpu"]._replace(events=[]), implicit_accuracy=0.9)
    assert verdict(run).level == "mixed" and "--validation-data" in verdict(run).sentences[-1]
    assert verdict(with_late(run, implicit_accuracy=0.51)).level == "poor"


def test_too_few_pairs_to_hold_some_out_is_said(runs):
    run = with_late(runs["lora-gpu"]._replace(events=[]), implicit_accuracy=0.9)
    few = with_setting(run, "data", validation_fraction=0.0)._replace(summary=run.summary | {"data": {"usable": 56}})
    text = verdict(few).sentences[-1]
    assert "None of the 56 pairs was held out: of fewer than 150" in text and "--validation-fraction 0.2" in text
    assert verdict(few).level == "mixed" and "not measured" in verdict(few).headline
    assert "None of the" not in verdict(run).sentences[-1]
    assert ENOUGH_TO_SHARE == held_out_pairs.ENOUGH


@pytest.mark.parametrize(("lora", "rate", "said"), [
    (False, 2.048e-8, "far too small"), (False, 1e-3, "far too large"), (True, 2e-2, "far too large"),
    (True, 1e-8, "far too small"), (False, 2e-5, None), (True, 1e-3, None),
])  # fmt: skip
def test_learning_rate_far_off(runs, lora, rate, said):
    run = with_setting(with_setting(runs["good"], "optim", learning_rate=rate), "lora", lora=lora)
    assert [title.partition(" is ")[2] for title in titles(run)] == ([said] if said else [])


def test_pairs_with_an_unreadable_image(runs):
    run = with_late(runs["good"], unusable_pairs=1)
    (title,) = titles(run)
    assert title == f"{run.done} of {run.done + run.pairs_seen():,} pairs were left out while training"
    assert verdict(run).level == "good"
    assert titles(run._replace(updates=run.updates[9::10])) == ["Some pairs were left out while training"]


def test_a_run_that_was_taken_up_in_another_folder_when_it_was_finished(runs):
    """It has no line of its own, and of --keep-best no accuracy but that of its summary."""
    chosen = {"step": 40, "of": 60, "early": False, "heldout_accuracy": 0.7, "heldout_pairs": 256}
    chosen |= {"choosing_accuracy": 0.75, "choosing_pairs": 64, "weights": "averaged"}
    run = runs["good"]._replace(updates=[], events=[])
    run = run._replace(summary=run.summary | {"done": 60, "taken": 1920})
    assert verdict(run).sentences[0] == "All 60 updates were made on 1,920 pairs."
    said = verdict(run._replace(summary=run.summary | {"kept": chosen})).sentences
    assert "in 70%" in said[1] and "averaged weights" in said[2] and "update 40 of 60" in said[3]


def test_ties_are_a_share_of_the_updates_that_are_known(runs):
    run = with_late(runs["good"], tied_pairs=16)
    assert "50% of the pairs were ties" in titles(run)
    assert "50% of the pairs were ties" in titles(run._replace(updates=run.updates[9::10]))


def test_predictions_that_have_grown(runs):
    assert titles(with_late(runs["good"], prediction_norm_ratio=1.08)) == ["Predictions have grown by 8%"]
    assert titles(with_late(runs["good"], prediction_norm_ratio=1.04)) == []


def begun(run, loss, pull):
    """The run as this version leaves it: its labels' loss and pull before the first update are said where it starts."""
    return run._replace(events=[{"event": "started", "step": 0, "start_loss": loss, "start_pull": pull}, *run.events])


def test_saturation(runs):
    run = with_late(runs["good"], gradient_factor=0.01)
    run = run._replace(updates=[run.updates[0] | {"gradient_factor": 0.5}, *run.updates[1:]])
    assert titles(run) == titles(begun(run, 0.69, 0.5)) == ["The loss is saturated"]
    assert "only 2.0% of the gradient at the start is left" in warnings(run)[0].text


def test_soft_labels_that_pull_little_from_the_start_are_not_taken_for_saturation(runs):
    """Of a run of an earlier version the first update says it, where all logits are 0."""
    run = with_late(runs["good"], gradient_factor=0.03)
    assert titles(begun(run, 0.69, 0.04)) == titles(run) == []
    late = run._replace(updates=run.updates[9::10])
    assert titles(late) == ["The loss is saturated"], "nothing says what its labels were"


def test_what_pulls_nowhere_at_the_start_gives_no_share(runs):
    assert titles(begun(with_late(runs["good"], gradient_factor=0.0), 0.5, 0.0)) == []


def test_kto_has_a_start(runs):
    kto = with_setting(with_late(runs["good"], gradient_factor=0.01), "method", method="kto")
    assert titles(begun(kto, 0.5, 0.125)) == ["The loss is saturated"]
    assert titles(kto) == [], "of an earlier version it is not known"


def test_advice_names_settings_that_the_method_reads(runs):
    scale = {"reference_win_error": 0.1, "win_error_vs_reference": 0.003, "lose_error_vs_reference": 0.004}
    for method, said in (("dpo", "raise beta, or add --sft-weight."), ("kto", "or raise beta.")):
        run = with_setting(with_late(runs["good"], **scale), "method", method=method)
        (found,) = [warning for warning in warnings(run) if warning.title == "Both errors rise"]
        assert found.text.endswith(said) and ("--sft-weight" in found.text) == (method == "dpo")
    for method, said in (("dpo", True), ("kto", True), ("mapo", False), ("sft", False)):
        run = with_setting(runs["over"], "method", method=method)
        (found,) = [warning for warning in warnings(run) if warning.title.startswith("Faithfulness fell")]
        assert ("raise beta" in found.text) == said and "lower learning rate" in found.text


def test_both_errors_rising_and_when_it_is_grave(runs):
    scale = {"reference_win_error": 0.1}
    mild = with_late(runs["good"], win_error_vs_reference=0.003, lose_error_vs_reference=0.004, **scale)
    grave = with_late(runs["good"], win_error_vs_reference=0.02, lose_error_vs_reference=0.03, **scale)
    assert titles(mild) == titles(grave) == ["Both errors rise"]
    assert [warnings(run)[0].grave for run in (mild, grave)] == [False, True]
    assert verdict(grave).level == "mixed" and "both errors rise" in verdict(grave).headline
    assert titles(with_late(runs["good"], win_error_vs_reference=-0.003, lose_error_vs_reference=0.02, **scale)) == []


def test_remembering(runs):
    run = with_held_out(with_late(runs["good"], implicit_accuracy=0.97), 0.6, 256)
    assert titles(run) == ["It remembers rather than learns"]


def test_nothing_moved(runs):
    assert titles(runs["flat"]) == ["The learning rate 2.05e-08 is far too small", "The model has hardly moved"]


def test_gradient_spike(runs):
    updates = [{**update, "grad_norm": 5.0 if update["step"] == 50 else 0.02} for update in runs["good"].updates]
    assert titles(runs["good"]._replace(updates=updates)) == [
        "The gradient jumped to 250 times its usual size at update 50"
    ]


def test_few_pairs_few_held_out_and_ties(runs):
    run = runs["good"]._replace(summary={**runs["good"].summary, "data": {"usable": 40}})
    assert "Only 40 training pairs" in titles(with_held_out(run, 0.7, 50)) and "Only 50 held-out pairs" in titles(
        with_held_out(run, 0.7, 50)
    )
    assert titles(with_late(runs["good"], tied_pairs=16)) == ["50% of the pairs were ties"]


def test_a_loss_that_was_no_number_comes_first(runs):
    assert titles(runs["failed"])[0] == "The loss was not a number at update 30"


def test_warnings_of_the_run_itself_are_kept(runs):
    said = ["xformers is missing", "learning rate 1 is judged elsewhere", "no held-out pairs"]
    (found,) = warnings(runs["good"]._replace(summary={**runs["good"].summary, "warnings": said}))
    assert found.text == "Xformers is missing. No held-out pairs."


def test_remembering_takes_enough_updates_and_pairs(runs):
    run = with_held_out(with_late(runs["good"], implicit_accuracy=0.97), 0.6, 256)
    assert titles(run._replace(updates=run.updates[:19], summary=run.summary | {"steps": 19})) == []
    assert titles(with_late(run, pairs=8)) == [], "12 updates of 8 pairs"
    assert titles(with_late(run, pairs=9)) == ["It remembers rather than learns"]


def test_what_remembers_is_not_told_to_train_longer(runs):
    run = with_held_out(with_late(runs["lora-gpu"], implicit_accuracy=0.97), 0.53, 256)
    assert "It remembers rather than learns" in titles(run)
    text = verdict(run).sentences[-1]
    assert "train on more pairs" in text and "longer" not in text


@pytest.mark.parametrize(("there", "limit", "data", "said"), [
    (35, 256, "", "hold out more, by --validation-fraction or --validation-data."),
    (35, 256, "mine", "hold out more, by a larger --validation-data."),
    (300, 35, "", "300 are held out: measure more of them, by --validation-pairs."),
])  # fmt: skip
def test_what_helps_where_few_are_held_out(runs, there, limit, data, said):
    run = with_held_out(with_setting(runs["good"], "data", validation_pairs=limit, validation_data=data), 0.7, 35)
    run = run._replace(summary=run.summary | {"data": {"usable": 800, "held out": there}})
    (found,) = [warning for warning in warnings(run) if warning.title == "Only 35 held-out pairs"]
    assert found.text.endswith(f"percentage points only; {said}") and "%" not in found.text

"""Rows of training steps: what is estimated is what a plan says, and bounds follow from counts."""

from dataclasses import replace

import pytest
import torch

from benchmarks import step_zero, steps
from benchmarks.sizes import SD15, SDXL, small_model
from benchmarks.steps import Setting


@pytest.mark.slow
@pytest.mark.parametrize("model", [SD15, SDXL], ids=lambda model: model.family)
def test_estimates_follow_a_plan(model):
    from dpo.planning.asked import Asked
    from dpo.planning.work import plan, planner
    from dpo.settings.flags import parse
    from dpo.train import train_step

    pairs, preset = model.pairs[0], {"sd": "sd15", "sdxl": "sdxl"}[model.family]
    flags = ["--preset", preset, "--batch-size", str(pairs), "--data-format", "store", "--reference", "recorded"]
    config, _ = parse([*flags, "--optimizer", "adamw8bit", "--checkpointing", "off"], with_pairs=False)
    found = plan(config, Asked(), planner(train_step))
    estimate = steps.needed(model, Setting("x", pairs, kernels=True, recorded=True))
    assert estimate == pytest.approx(found.peak, rel=0.1)


def test_estimates_order_settings():
    first = Setting("x", 16, kernels=True, recorded=True)
    base = steps.needed(SD15, first)
    assert steps.needed(SD15, replace(first, checkpointing=True)) < base
    assert steps.needed(SD15, replace(first, low_rank=True)) < base
    for more in ({"recorded": False}, {"kernels": False}, {"optimizer": "adamw"}, {"pairs": 32}):
        assert steps.needed(SD15, replace(first, **more)) > base


def test_what_cannot_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    (row,) = steps.ours(SD15, next(steps.ladder(SD15)), torch.device("cuda"), 0.01)
    assert row["failed"] == "not tried: 1 GiB are free" and row["GiB, estimated"] > 30


def test_the_headlines_come_first_and_are_predicted():
    found = [check.name for check in steps.checks(torch.device("cpu"), False, 1.0)]
    assert found[0].startswith("SD 1.5") and "16 pairs" in found[0] and "2 pairs" in found[1]
    assert "the peers' step" in found[2] and "the peers' step" in found[3]
    assert SD15.predicted[16] == (60.0, 0.29) and SDXL.predicted[4] == (9.2, 0.38)
    assert {setting.pairs for setting in steps.ladder(SDXL)} >= {2, 4}


def test_the_profile_is_of_the_fastest_row_of_all_weights():
    every = list(steps.ladder(SD15))
    rows = [{"model": SD15.name, "setting": s.name, "pairs": s.pairs, "pairs/s": 10.0 + i} for i, s in enumerate(every)]
    rows += [{"model": SD15.name, "setting": "peers: all weights", "pairs": 1, "pairs/s": 99.0}]
    rows += [{"model": SD15.name, "setting": every[-1].name, "pairs": every[-1].pairs, "failed": "out of memory"}]
    assert steps.fastest(SD15, rows) == every[-1] and every[-1].name != "LoRA"
    assert steps.fastest(SD15, [row for row in rows if row["setting"] in ("LoRA", "CUDA graph")]).graph
    assert steps.fastest(SDXL, rows) == next(steps.ladder(SDXL))  # nothing is known of it
    assert steps.fastest(SD15, [row for row in rows if row["setting"] == "LoRA"]) == every[0]
    device = torch.device("cpu")
    first, second = steps.profile_checks(device, False, 20.0, rows)
    assert every[-1].name in first.name and first.alone and "prepared, recorded reference" in second.name


@pytest.mark.long
@pytest.mark.parametrize("low_rank", [False, True], ids=["full", "LoRA"])
def test_a_step_starts_at_zero_and_is_measured(low_rank):
    """The rows' own step, by the trainer's own parts: small enough for every run of the tests."""
    device, model = torch.device("cpu"), small_model()
    setting = Setting("x", 2, low_rank=low_rank)
    (row,) = step_zero.step_zero(model, setting, device)
    assert row["ok"] and row["value"] == 0.0
    (row,) = steps.ours(model, setting, device, 0.0)
    assert row["pairs/s"] > 0 and row["ms an update"] > 0 and "failed" not in row

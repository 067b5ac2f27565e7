"""Rows of rectified flow: they run on a CPU in small, start at 0, and are estimated as a plan says."""

import pytest
import torch

from benchmarks import flows
from benchmarks.sections import SECTIONS
from dpo.planning.cuda import GIB


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(flows.FLOWS)), ids=[flow.name for flow in flows.FLOWS])
def test_a_family_starts_at_zero_and_is_measured(number):
    check = flows.checks(torch.device("cpu"), True, 1.0)[number]
    start, row = check.work()
    assert check.name.startswith("small") and start["ok"] and start["value"] == 0.0
    assert row["pairs/s"] > 0 and row["TFLOP/s"] > 0 and row["GiB, estimated"] > 6


def test_what_cannot_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    rows = [list(flows.rows(flow, torch.device("cuda"), False)) for flow in flows.FLOWS]
    assert [row["failed"] for (row,) in rows] == ["not tried: 1 GiB are free"] * 2


def test_they_come_last():
    assert [name for name, section in SECTIONS.items() if section.by_default][-1] == "flows"
    assert sum(section.share for section in SECTIONS.values() if section.by_default) == 540


@pytest.mark.slow
@pytest.mark.parametrize("flow", flows.FLOWS, ids=lambda flow: flow.name)
def test_estimates_follow_a_plan(flow):
    from dpo.planning.asked import Asked
    from dpo.planning.work import plan, planner
    from dpo.settings.flags import parse
    from dpo.train import train_step

    config, _ = parse(flows.flags(flow, torch.device("cuda"), False), with_pairs=False)
    found = plan(config, Asked(), planner(train_step))
    assert flows.needed(flow) / GIB == pytest.approx(found.peak / GIB, rel=0.02)

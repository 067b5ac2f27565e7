"""The benchmark of host time takes both ways to every operation, compares like with like, and writes its table."""

import json

import pytest
import torch

from benchmarks import host
from csrc_triton import geglu, group_norm_silu, layer_norm, noising, op, pair_errors


@pytest.fixture
def through(monkeypatch):
    """The names of the operations that went through torch's dispatcher."""
    seen = []
    for module in (geglu, group_norm_silu, layer_norm, noising, pair_errors):
        for each in [value for value in vars(module).values() if isinstance(value, op.Op)]:
            own = each.registered
            monkeypatch.setattr(each, "registered", lambda *args, own=own: seen.append(own._name) or own(*args))
    return seen


def test_both_ways_are_taken_and_give_the_same(through):
    torch.manual_seed(0)
    for case in host.cases():
        for direction, work in host.works(case):
            short = work()
            assert through == [], case.name
            with host.dispatched():
                slow = work()
            assert len(through) == (1 if direction == "forward" else 2), (case.name, through)
            through.clear()
            pairs = zip(
                *([found] if isinstance(found, torch.Tensor) else found for found in (short, slow)), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs), case.name


def test_the_table_has_a_row_for_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert host.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["host"]
    assert len(rows) == 12 and {row["op"] for row in rows} == {case.name for case in host.cases()}
    assert all(row["short us"] > 0 and row["dispatcher / short"] > 0 for row in rows)
    assert "| geglu | forward and backward |" in capsys.readouterr().out and (tmp_path / "host.md").is_file()


def test_one_round_has_no_quartiles(tmp_path, capsys):
    with pytest.raises(SystemExit):
        host.main(["--rounds", "1", "--out", str(tmp_path)])
    assert "--rounds 1: at least 2" in capsys.readouterr().err

"""The GPU benchmark runs from end to end on tiny shapes, and says so when something fails."""

import csv
import json

import pytest
import torch

from benchmarks import gpu, parity


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--smoke", "--minutes", "60"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(row["ok"] for row in found["parity"]) and len(found["parity"]) > 20
    assert {row["op"] for row in found["kernels"]} == {
        "noise_pairs",
        "pair_errors",
        "geglu",
        "group_norm_silu",
        "add_layer_norm",
    }
    assert all(row["fused_us"] > 0 and "failed" not in row for row in found["kernels"])
    assert [row for row in found["steps"] if row.get("failed")] == []
    assert all(row["pairs/s"] > 0 for row in found["steps"]) and len(found["steps"]) > 5
    assert len(list(csv.DictReader((tmp_path / "steps.csv").open()))) == len(found["steps"])
    assert len(list(tmp_path.iterdir())) <= 8
    assert "x peers" in (tmp_path / "tables.md").read_text()


def test_a_failed_check_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        parity,
        "rows",
        lambda device, smoke: iter([{"op": "x", "dtype": "fp32", "kernel": 1.0, "plain": 0.0, "ok": False}]),
    )
    assert gpu.main(["--out", str(tmp_path), "--smoke", "--section", "parity"]) == 1


def test_a_section_keeps_to_its_time(tmp_path):
    gpu.main(["--out", str(tmp_path), "--smoke", "--section", "parity", "--minutes", "0"])
    rows = json.loads((tmp_path / "results.json").read_text())["parity"]
    assert len(rows) == 2 and "stopped" in rows[-1]["op"]


def test_what_is_captured_in_a_graph_has_gradients_and_draws_anew():
    """The capture needs a GPU; here: the function has gradients everywhere, is deterministic, and follows the draws."""
    run, draws = parity.ops_of_a_step(torch.device("cpu"))
    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in first[2:]) and len(first) == 11
    draws += 1
    moved = run()
    assert (
        not torch.equal(first[0], moved[0]) and not torch.equal(first[1], moved[1]) and torch.equal(first[2], moved[2])
    )

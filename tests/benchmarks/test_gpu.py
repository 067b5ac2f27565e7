"""The call for a GPU, on a CPU: every section runs on tiny shapes, and nothing that a check does ends the others."""

import csv
import json
import os
import sys
import tarfile
import zipfile

import pytest
import torch

from benchmarks import gpu, parity, parity_pairs
from benchmarks.checks import Check
from benchmarks.children import command_of, rows_of, work_off
from benchmarks.measuring import RESULTS, Results
from benchmarks.sections import SECTIONS


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    names = [name for name in SECTIONS if name != "planted"]
    assert gpu.main(["--out", str(tmp_path), "--smoke", "--minutes", "60", "--section", *names]) == 0
    found = results(tmp_path)
    assert set(names) <= set(found)
    failed = [row["failed"] for name in names for row in found[name] if row.get("failed")]
    assert all(why == "not tried: needs a GPU" for why in failed)
    assert all(row["ok"] for row in found["parity"]) and len(found["parity"]) > 150
    assert {row["op"] for row in found["kernels"]} == {
        "noise_pairs",
        "pair_errors",
        "geglu",
        "group_norm_silu",
        "add_layer_norm",
    }
    assert all(row["fused_us"] > 0 and row["host_us"] > 0 for row in found["kernels"])
    assert [row["value"] for row in found["step0"] if row["check"].startswith("largest")] == [0.0, 0.0]
    rates = [row["pairs/s"] for row in found["steps"] if not row.get("failed")]
    assert len(rates) > 5 and min(rates) > 0 and "x peers" in (tmp_path / "tables.md").read_text()
    assert {row["setting"] for row in found["peers"]} == {"peers: all weights", "peers: LoRA"}
    assert all(row["second: same bits"] and row["killed: same bits"] for row in found["training"])
    best = max((row for row in found["steps"] if is_ours(row)), key=lambda row: row["pairs/s"])
    assert len(found["profile"]) == 15
    assert {(row["setting"], row["pairs"]) for row in found["profile"]} == {(best["setting"], best["pairs"])}
    assert [row.get("value") for row in found["flows"]] == [0.0, None] * 2 and found["flows"][-1]["pairs/s"] > 0
    assert len(list(csv.DictReader((tmp_path / "steps.csv").open()))) == len(found["steps"])
    with tarfile.open(tmp_path / gpu.ARCHIVE) as archive:
        assert {"results.json", "tables.md", "steps.png", "kernels.png", "parity.csv"} <= set(archive.getnames())


def is_ours(row):
    return row.get("pairs/s") and row["setting"] != "LoRA" and not row["setting"].startswith("peers")


@pytest.mark.slow
def test_a_section_is_told_the_rows_of_the_one_before_it(tmp_path, capsys):
    """Through the call itself, its file of results and a child: the profile is of the row that was fastest."""
    held = Results(tmp_path, {})
    held.add("steps", {"model": "small", "setting": "NCHW, without kernels", "pairs": 2, "pairs/s": 9e9})
    rows = list(rows_of(command_of("profile", True, tmp_path / RESULTS), 60.0, os.environ, lambda about: None))
    assert len(rows) == 15 and {row["setting"] for row in rows} == {"NCHW, without kernels"}


@pytest.mark.slow
def test_planted_faults(tmp_path, capsys):
    """An error without a message, no memory, a hang, a signal and a sudden end are rows; what is behind them is reached."""
    assert gpu.main(["--out", str(tmp_path), "--smoke", "--section", "planted", "--minutes", "5"]) == 1
    rows = results(tmp_path)["planted"]
    failed = {row["check"]: row["failed"] for row in rows if "failed" in row}
    assert [row["value"] for row in rows if "value" in row] == ["first", "a row", "last"]
    assert failed["raises without a message"] == "ValueError: ValueError"
    assert "memory" in failed["runs out of memory"]
    assert failed["hangs"] == "stopped: longer than its 1 s"
    assert failed["is killed"].startswith("killed by signal 15")
    assert failed["gives a row, then ends its process"].startswith("ended with code 3")
    with tarfile.open(tmp_path / gpu.ARCHIVE) as archive:
        kept = archive.extractfile("tables.md")
        assert kept is not None and "longer than its 1 s" in kept.read().decode()


def child(*messages, after=""):
    """A command that tells these messages."""
    lines = "".join(f"print({json.dumps(message)!r}, flush=True);" for message in messages)
    return [sys.executable, "-S", "-c", f"import os,sys,time;{lines}{after}"]


@pytest.mark.parametrize(
    ("messages", "after", "expected"),
    [
        ([], "sys.exit('no such thing')", [("the start", "ended with code 1: no such thing")]),
        ([{"about": {"a": 1}}], "", []),
        ([{"about": {}}, {"begin": 0, "name": "x", "limit": 9}], "", [("x", "ended without a word")]),
        ([{"about": {}}, {"begin": 0, "name": "x", "limit": 9}], "time.sleep(99)", [("x", "stopped: the section's time is used up")]),
    ],
    ids=["dies at the start", "has nothing", "ends in a check", "runs over"],
)  # fmt: skip
def test_what_a_child_does_is_said(messages, after, expected, monkeypatch):
    from benchmarks import children

    monkeypatch.setattr(children, "LEAST", 0.3)
    heard = {}
    rows = list(rows_of(child(*messages, after=after), 1.0, os.environ, heard.update))
    reached = [(row["check"], row["failed"]) for row in rows if "not tried" not in row["failed"]]
    assert reached[:1] == expected and heard == (messages[0]["about"] if messages else {})


def test_checks_of_a_child_are_worked_off():
    def raising():
        yield {"value": 1}
        raise KeyError

    told = []
    checks = [Check("a", raising), Check("b", lambda: [{"value": 2}], alone=True), Check("c", list)]
    work_off(checks, 0, told.append)
    assert [message.get("row") for message in told if "row" in message] == [
        {"value": 1},
        {"check": "a", "failed": "KeyError: KeyError", "ok": False},
    ]
    assert told[-1] == {"again": 1}
    told.clear()
    work_off(checks, 1, told.append)
    assert {"row": {"value": 2}} in told and told[-1] == {"again": 2}
    told.clear()
    work_off(checks, 2, told.append)
    assert told[-1] == {"end": 2}


def test_no_time_is_said_and_leaves_a_report(tmp_path, capsys):
    gpu.main(["--out", str(tmp_path), "--smoke", "--section", "parity", "steps", "--minutes", "0"])
    found = results(tmp_path)
    assert all("time is used up" in found[name][0]["failed"] for name in ("parity", "steps"))
    assert "time is used up" in (tmp_path / "tables.md").read_text() and (tmp_path / gpu.ARCHIVE).is_file()


@pytest.mark.long
def test_wheels_are_unpacked_without_a_network(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "there = True\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "carried.py,,\ncarried-1.0.dist-info/RECORD,,\n")
    row = gpu.unpack(wheels, site)
    assert row.get("value", 0) > 0 and (site / "carried.py").is_file(), row
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    assert "failed" in gpu.unpack(wheels, tmp_path / "other")


def test_rates_stand_beside_the_peers_of_the_same_model(tmp_path):
    held = Results(tmp_path, {})
    held.add("steps", {"model": "a", "setting": "peers: all weights", "pairs/s": 2.0})
    assert gpu.beside_peers(held, {"model": "a", "pairs/s": 5.0})["x peers"] == 2.5
    assert "x peers" not in gpu.beside_peers(held, {"model": "b", "pairs/s": 5.0})
    assert "x peers" not in gpu.beside_peers(held, {"model": "a", "failed": "x"})


def test_a_wrong_kernel_fails_the_parity_of_pairs(monkeypatch):
    def wrong(*args, **options):
        found = parity_pairs.pair_errors_reference(*args, **options)
        return found._replace(logit=found.logit * 1.01)

    rows = list(parity_pairs.pairs_in(torch.device("cpu"), "noise", {}))
    assert all(row["ok"] for row in rows)
    monkeypatch.setattr(parity_pairs, "pair_errors", wrong)
    rows = list(parity_pairs.pairs_in(torch.device("cpu"), "noise", {}))
    assert not any(row["ok"] for row in rows if row["check"].endswith("logit"))


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

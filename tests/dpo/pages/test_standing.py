"""dpo.pages.standing: of which update a result is, and where its run stands, also after a kill and in older folders."""

import json

import pytest

from dpo.pages.standing import apart, left_by_run, result_of

ENDED = {"status": "finished", "steps": 1}
KEPT = {"kept": {"step": 4}, "steps": 8}


def folder(root, summary, updates, totals, checkpoints=()):
    """The files of a run with lines of these `updates`, and a start for each of the `totals`."""
    lines = [{"event": "started", "step": 0, "total": total} for total in totals] + [{"step": step} for step in updates]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    if summary is not None:
        (root / "summary.json").write_text(json.dumps(summary), "utf-8")
    for step in checkpoints:
        (root / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("summary", "updates", "totals", "checkpoints", "said"),
    [
        (ENDED, [1], [1], [1], None),
        ({**ENDED, "result": {"step": 1, "of": 1}}, [1], [1], [], None),
        (ENDED | KEPT, range(1, 9), [8], [4, 8], None),
        (ENDED | KEPT, range(1, 9), [99], [8], None),  # --patience
        ({"status": "interrupted", "steps": 8, "result": {"step": 8, "of": 8}}, range(1, 9), [8], [8], None),
        ({"status": "interrupted", "steps": 8}, range(1, 9), [8], [8], None),  # not compared yet, of an earlier version
        (None, [], [], [], None),
        (
            {"status": "interrupted", "steps": 40, "result": {"step": 1, "of": 1}},
            [1, 2, 3], [1, 40], [3],
            "stands at update 3 of 40, interrupted; its result is that of update 1:",
        ),
        (ENDED, [1, 2, 3], [1, 40], [1], "stands at update 3 of 40; its result is that of update 1:"),  # kill -9
        (ENDED, [1], [1, 40], [1, 3], "stands at update 3 of 40; its result is that of update 1:"),  # with --log-every
        (ENDED | KEPT, range(1, 7), [8], [6], "stands at update 6 of 8; its result is that of update 4:"),  # gone back
        (
            {"status": "failed", "steps": 40},
            [1, 2, 3], [1, 40], [3],
            "stands at update 3 of 40, failed; its result is an earlier one:",
        ),
    ],
)  # fmt: skip
def test_a_result_that_the_run_has_left_is_told(tmp_path, summary, updates, totals, checkpoints, said):
    found = apart(folder(tmp_path, summary, updates, totals, checkpoints))
    assert found is None if said is None else found.startswith(f"{tmp_path} {said}")


@pytest.mark.parametrize(
    "odd",
    [{"result": 3, "steps": "x"}, {"result": {"step": "a"}}, {"status": "finished", "kept": 1}, {"status": "finished"}],
)
def test_what_a_summary_says_in_another_way_is_not_known(tmp_path, odd):
    assert result_of(odd) == {}
    assert "its result is an earlier one" in apart(folder(tmp_path, odd, [3], [40]))


def test_a_part_of_a_result_that_its_run_has_left_is_told(tmp_path, monkeypatch):
    """By whichever of its names a later run may begin with it; a name that only looks like one in the folder is no part of it."""
    folder(tmp_path, ENDED, [1, 2, 3], [1, 40])
    (tmp_path / "config.toml").write_text('[method]\nmethod = "dpo"\n[output]\ncheckpoint_every = 1\n', "utf-8")
    (tmp_path / "unet").mkdir()
    assert left_by_run(str(tmp_path)) is None, "there is no result"
    (tmp_path / "model_index.json").touch()
    for name in (tmp_path, tmp_path / "unet"):
        assert left_by_run(str(name)) == apart(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert left_by_run("unet") is not None and left_by_run("embedded") is None
    assert left_by_run(str(tmp_path / "checkpoints" / "step-00000001")) is None

"""benchmarks.losses: equal trees are equal, and one changed bit is seen."""

import copy
import subprocess
import sys

import pytest

from benchmarks import losses

RUN = {
    "update 1": {"loss": 0.6931471824645996, "grad_norm": 1.25},
    "update 2": {"loss": 0.69, "grad_norm": None},
    "files": {"policy": "04547714", "optimizer": "3d0664e0"},
}


def test_equal_runs_have_no_differences():
    assert losses.differences(RUN, copy.deepcopy(RUN)) == []


def test_the_last_bit_a_missing_figure_and_another_file_are_told():
    other = copy.deepcopy(RUN)
    other["update 1"]["loss"] = 0.6931471824645997
    del other["update 2"]
    other["files"]["policy"] = "ffffffff"
    lines = losses.differences(RUN, other)
    assert len(lines) == 3, lines  # a grad_norm of None is missing in both
    assert lines[0] == "files: policy 04547714 -> ffffffff"
    assert lines[1] == "update 1: loss 0.6931471824645996 -> 0.6931471824645997"
    assert lines[2] == "update 2: loss 0.69 -> None"


@pytest.mark.parametrize(("changed", "code", "word"), [(False, 0, "equal, bit for bit"), (True, 1, "differs")])
def test_the_command_says_what_it_found(tmp_path, monkeypatch, capsys, changed, code, word):
    """Between two commits of a repository whose trainer only writes the files that a run leaves."""
    repository = tmp_path / "repository"
    trainer = repository / "dpo" / "train.py"
    trainer.parent.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(repository)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for loss in (0.5, 0.25 if changed else 0.5):
        trainer.write_text(TRAINER.replace("LOSS", str(loss)), encoding="utf-8")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", str(loss)], check=True)
    monkeypatch.chdir(repository)
    assert losses.main(["HEAD~1", "HEAD", "--run", "--method dde", "--steps", "2"]) == code
    said = capsys.readouterr().out
    assert said.startswith("--method dde: losses ") and word in said.splitlines()[0]
    assert ("update 1: loss 0.5 -> 0.25" in said) == changed
    assert subprocess.run([*git, "worktree", "list"], check=True, capture_output=True).stdout.count(b"\n") == 1


TRAINER = """
import json, pathlib, sys
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
rows = [{"step": step, **dict.fromkeys(FIGURES, 0.0), "loss": LOSS} for step in range(1, int(sys.argv[-1]) + 1)]
rows.insert(0, {"event": "started", "step": 0})
(output / "metrics.jsonl").write_text("\\n".join(map(json.dumps, rows)))
(output / "checkpoints" / "step").mkdir(parents=True)
(output / "checkpoints" / "step" / "state.json").write_text(json.dumps({"checksums": {"policy": "1"}}))
""".replace("FIGURES", repr(losses.FIGURES))


def test_it_starts_as_a_command():
    said = subprocess.run(
        [sys.executable, "-m", "benchmarks.losses", "--help"], check=True, capture_output=True, text=True
    )
    assert "bit for bit" in said.stdout

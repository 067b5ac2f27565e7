"""dpo.pages.folder: any run folder can be read, whole or not."""

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.pages.folder import read_run
from tests.help.fake_run import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), "good", updates=40)


def test_a_whole_run(folder):
    run = read_run(folder)
    assert (run.done, run.wanted, run.status, run.method, run.lora, run.pairwise) == (
        40,
        40,
        "finished",
        "dpo",
        False,
        True,
    )
    assert run.effective_batch() == 32 and run.pairs_seen() == 40 * 32 and run.learning_rate() == pytest.approx(1e-5)
    assert len(run.validations) == 6 and len(run.grids) == 1 and run.tables["weight"].shape == (1000,)
    steps, loss = run.series("loss")
    assert steps.tolist() == list(range(1, 41)) and run.late("loss") == pytest.approx(loss[-8:].mean())


def test_updates_without_a_line_are_counted_by_the_summary(folder):
    """--log-every 10, and a run that goes on in another folder."""
    run = read_run(folder)
    for updates in (run.updates[9::10], run.updates[20:], []):
        few = run._replace(updates=updates)
        assert (few.done, few.pairs_seen()) == (40, None), "a summary of an earlier version"
        few = few._replace(summary=run.summary | {"done": 40, "taken": 1290})
        assert (few.done, few.pairs_seen()) == (40, 1290)
    killed = run._replace(updates=run.updates[9::10], summary={"status": "interrupted", "done": 20, "taken": 640})
    assert (killed.done, killed.pairs_seen()) == (40, None), "its summary is that of the start before"
    assert run._replace(summary={"status": "interrupted", "done": 40, "taken": 1290}).pairs_seen() == 40 * 32


def test_late_deciles_weigh_updates_by_their_pairs(folder):
    run = read_run(folder)._replace(
        updates=[
            {"step": 1, "pairs_by_decile": [1] + [0] * 9, "accuracy_by_decile": [1.0] + [None] * 9},
            {"step": 2, "pairs_by_decile": [3] + [0] * 9, "accuracy_by_decile": [0.0] + [None] * 9},
        ]
        * 5
    )
    late = run.late_deciles("accuracy")
    assert late[0] == pytest.approx(0.25) and np.isnan(late[1:]).all()


def test_scaled_learning_rate_is_the_one_that_was_used(folder):
    run = read_run(folder)
    settings = {
        **run.settings,
        "optim": {**run.settings["optim"], "scale_lr": True, "learning_rate": 1e-8, "accumulation": 4},
    }
    assert run._replace(settings=settings).learning_rate() == pytest.approx(1e-8 * 128)


def test_the_last_of_two_lines_for_a_step_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 1, "loss": 3}\n{"st'
    )
    assert read_run(tmp_path).series("loss")[1].tolist() == [3, 2]


def test_a_run_without_summary_and_with_damaged_files(tmp_path):
    for name in ("config.toml", "summary.json", "tables.json"):
        (tmp_path / name).write_text("{ not", encoding="utf-8")
    run = read_run(tmp_path)
    assert (run.done, run.status, run.settings, run.summary, run.tables) == (0, "interrupted", {}, {}, {})


def test_no_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)

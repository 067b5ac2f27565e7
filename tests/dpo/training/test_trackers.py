"""dpo.training.trackers: metrics.jsonl survives kills and resumes; what is not to be had stops the run."""

import io
import json
import logging
import sys
import types

import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.pages.folder import METRICS_FILE, TENSORBOARD, WANDB_ID_FILE, read_records
from dpo.training.trackers import check, open_trackers
from tests.help.trackers import fake_wandb


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dpo"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dpo")
    return caplog


def run(folder, steps, **settings):
    trackers = open_trackers(folder, **settings)
    for step in steps:
        trackers.log(step, {"loss": 0.5 + step})
    trackers.close()


def steps_in(folder):
    return [record["step"] for record in read_records(folder / METRICS_FILE)]


def test_every_line_is_on_disk_before_close(tmp_path):
    trackers = open_trackers(tmp_path)
    trackers.log(1, {"loss": 0.6, "deciles": [0.1, None]})
    trackers.event({"event": "validation", "step": 1, "heldout_accuracy": 0.6})
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.6, "deciles": [0.1, None]},
        {"event": "validation", "step": 1, "heldout_accuracy": 0.6},
    ]
    trackers.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    trackers = open_trackers(tmp_path)
    trackers.log(1, {"loss": float("nan"), "deciles": [float("inf"), 1.0], "path": tmp_path})
    trackers.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "deciles": [None, 1.0],
        "path": str(tmp_path),
    }


def test_resume_drops_what_lies_after_the_checkpoint(tmp_path):
    run(tmp_path, range(1, 11))
    run(tmp_path, range(7, 9), resume_step=6)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_resume_mends_a_torn_last_line(tmp_path):
    run(tmp_path, range(1, 4))
    with (tmp_path / METRICS_FILE).open("a") as lines:
        lines.write('{"step": 4, "lo')
    assert steps_in(tmp_path) == [1, 2, 3]
    run(tmp_path, [4], resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / METRICS_FILE).read_text().endswith("}\n")


def test_resume_keeps_events_of_the_kept_stretch(tmp_path):
    trackers = open_trackers(tmp_path)
    trackers.event({"event": "start"})
    for step in (1, 2):
        trackers.event({"event": "validation", "step": step})
    trackers.close()
    run(tmp_path, [], resume_step=1)
    assert read_records(tmp_path / METRICS_FILE) == [{"event": "start"}, {"event": "validation", "step": 1}]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_new_run_begins_anew(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, [1])
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("resume_step", [None, 1])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_gives_way_to_a_file(tmp_path, monkeypatch, resume_step, there):
    """Lines that are appended through it would land in somebody else's file; so would the id of the W&B run."""
    out, target = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    if there:
        target.write_text('{"step": 1}\n')
    for name in (METRICS_FILE, WANDB_ID_FILE):
        (out / name).symlink_to(target)
    fake_wandb(monkeypatch, [])
    run(out, [2], resume_step=resume_step, wandb=True)
    assert steps_in(out) == [1, 2][not (resume_step and there) :] and not (out / METRICS_FILE).is_symlink()
    assert not (out / WANDB_ID_FILE).is_symlink() and len((out / WANDB_ID_FILE).read_text()) > 8
    assert target.read_text() == '{"step": 1}\n' if there else not target.exists()


def test_the_metrics_file_is_there_before_the_trackers_files(tmp_path, monkeypatch):
    """It tells a start that was killed in between from a folder of somebody else's."""

    def killed(**_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=killed))
    with pytest.raises(KeyboardInterrupt):
        open_trackers(tmp_path, wandb=True)
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_missing_file_is_no_records(tmp_path):
    assert read_records(tmp_path / METRICS_FILE) == []
    run(tmp_path, [1], resume_step=0)
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_stops_the_run_and_names_the_extra(tmp_path, monkeypatch, name):
    check(tensorboard=False, wandb=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError,
        match=rf"^--{name} \(or --report_to {name}\): {name} is not installed: pip install 'diffusion-dpo\[tracking\]'",
    ):
        check(**{"tensorboard": False, "wandb": False, name: True})


def test_a_tensorboard_that_cannot_be_imported_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"^--tensorboard: cannot be imported .* leave --tensorboard out"):
        run(tmp_path, [1], tensorboard=True)


def test_tensorboard_gets_scalars_and_lists(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as events

    trackers = open_trackers(tmp_path, tensorboard=True)
    trackers.log(3, {"loss": 0.25, "accuracy_by_decile": [0.5, None], "note": "x"})
    trackers.event({"event": "validation", "step": 3, "heldout_accuracy": 0.75})
    trackers.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "accuracy_by_decile/0", "validation/heldout_accuracy"}
    (scalar,) = read.Scalars("validation/heldout_accuracy")
    assert (scalar.step, scalar.value) == (3, 0.75)


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.png"
    Image.new("RGB", (6, 4), (250, 20, 30)).save(path)
    return path


def test_pictures_go_to_wandb(tmp_path, monkeypatch, grid):
    calls = []
    fake_wandb(monkeypatch, calls)
    trackers = open_trackers(tmp_path, wandb=True)
    trackers.picture(7, grid)
    trackers.picture(8, None)  # none was drawn
    (sent,) = [call for call in calls if call[0] == "log"]
    assert sent[:2] == ("log", 7) and sent[2]["samples"].size == (6, 4)
    open_trackers(tmp_path / "alone").picture(7, tmp_path / "missing.png")  # read for nobody


def test_pictures_go_to_tensorboard(tmp_path, grid):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(tmp_path, tensorboard=True)
    trackers.picture(7, grid)
    trackers.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD))
    events.Reload()
    (found,) = events.Images("samples")
    assert found.step == 7 and Image.open(io.BytesIO(found.encoded_image_string)).getpixel((0, 0)) == (250, 20, 30)


def test_wandb_run_continues_under_its_id(tmp_path, monkeypatch):
    calls = []
    fake_wandb(monkeypatch, calls)
    settings = {"wandb": True, "project": "p", "run_name": "r", "config": {"beta": 2000}}
    run(tmp_path, [1], **settings)
    run(tmp_path, [2], resume_step=1, **settings)
    run(tmp_path, [1], **settings)
    first, second, anew = (call[1] for call in calls if call[0] == "init")
    assert first["id"] == second["id"] != anew["id"]
    assert first["config"] == {"beta": 2000} and first["project"] == "p" and first["name"] == "r"
    assert ("log", 2, {"loss": 2.5}) in calls and calls[-1] == ("finish",)


def test_wandb_that_fails_to_start_stops_a_new_run_and_costs_a_resumed_one_a_warning(tmp_path, monkeypatch, heard):
    fake_wandb(monkeypatch, [], fail=RuntimeError("no API key"))
    with pytest.raises(UserError, match=r"^--wandb: W&B cannot be used \(RuntimeError: no API key\): log in"):
        run(tmp_path, [1], wandb=True)
    run(tmp_path, [1], wandb=True, resume_step=0)
    assert steps_in(tmp_path) == [1]
    assert len(heard.records) == 1 and "no API key" in heard.text

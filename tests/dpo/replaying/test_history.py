"""What a run's folder says of its updates: settings, the state before them, and whether figures are the same."""

import json
import shutil

import pytest
import torch

from dpo.common.errors import UserError
from dpo.pages.folder import read_run
from dpo.replaying import history
from dpo.settings.config import Config, change, flatten, to_toml
from dpo.training import checkpoint

BASE = change(Config(), model="m", data="d", device="cpu", steps=40)


def save(folder, step, config=BASE, data="pairs"):
    tensors = {"policy": {"w": torch.ones(1)}, "tables": {"correction": torch.zeros(2)}}
    tensors |= {"optimizer": {"0.exp_avg": torch.zeros(1)}}
    state = {"step": step, "position": 2 * step, "config": flatten(config), "fingerprints": {"data": data}}
    state |= {"optimizer": {"numbers": {}, "param_groups": [{"params": [0]}]}, "scaler": None}
    checkpoint.save(checkpoint.folder_of(folder / "checkpoints", step), tensors, state)


@pytest.fixture
def folder(tmp_path):
    """A run of 30 updates, resumed after 20 with another learning rate; checkpoints after 10 and 20."""
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.toml").write_text(to_toml(change(BASE, learning_rate=3e-5)), encoding="utf-8")
    lines = [{"step": step, "loss": 0.1 * step, "pairs": 2, "seconds": 2.0} for step in range(1, 31)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    save(place, 10, change(BASE, learning_rate=1e-5))
    save(place, 20, change(BASE, learning_rate=2e-5))
    return place


@pytest.mark.parametrize(("update", "rate"), [(1, 1e-5), (10, 1e-5), (11, 2e-5), (20, 2e-5), (21, 3e-5), (30, 3e-5)])
def test_the_settings_are_those_that_the_update_had(folder, update, rate):
    assert history.settings(read_run(folder), update).optim.learning_rate == rate


def test_the_number_of_processes_follows_from_the_pairs_of_an_update(folder):
    save(folder, 25, change(BASE, batch_size=2, accumulation=3, effective_batch=24))
    found = [history.processes(read_run(folder), update) for update in (20, 21, 30)]
    assert found == [1, 4, 1], "the run went on with fewer"


def test_a_folder_that_says_no_settings_is_refused(folder):
    (folder / "config.toml").unlink()
    with pytest.raises(UserError, match=r"does not say with which settings.*config\.toml is missing"):
        history.settings(read_run(folder), 25)


def test_updates_that_were_made_or_may_have_failed_can_be_asked_for(folder):
    for update in (1, 30, 31):
        assert history.read(folder, update).folder == folder
    with pytest.raises(UserError, match="has made 30 updates: give --update a number from 1 to 31"):
        history.read(folder, 32)
    save(folder, 40)  # all that are wanted
    with pytest.raises(UserError, match="has made 40 updates: give --update a number from 1 to 40"):
        history.read(folder, 41)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        history.read(tmp_path, 1)


@pytest.mark.parametrize(("update", "step"), [(31, 20), (21, 20), (20, 10), (11, 10), (10, None)])
def test_the_state_before_an_update_is_the_last_one_kept(folder, update, step):
    saved = history.state_before(read_run(folder), update)
    assert (saved and saved.state["step"]) == step


def test_damaged_and_abandoned_states_are_passed_over(folder, caplog):
    shutil.copytree(folder / "checkpoints" / "step-00000020", folder / "checkpoints" / "abandoned-1" / "step-00000025")
    (folder / "checkpoints" / "step-00000020" / "policy.safetensors").write_bytes(b"torn")
    assert history.state_before(read_run(folder), 30).state["step"] == 10
    assert "policy.safetensors was truncated or altered; trying the one before" in caplog.text


def test_figures_are_compared_to_the_last_bit(folder):
    run = read_run(folder)
    same = {step: {"loss": 0.1 * step, "pairs": 2, "new": 1} for step in (7, 8, 99)}
    assert history.compared(run, same) == {"updates": 2, "first": None}
    same[8]["loss"] = 0.1 * 8 * (1 + 2**-52)
    assert history.compared(run, same)["first"] == {
        "update": 8, "figure": "loss", "run": 0.1 * 8, "replay": 0.1 * 8 * (1 + 2**-52),
    }  # fmt: skip


def test_what_the_updates_took_the_run(folder):
    run = read_run(folder)
    assert history.cost(run, 6, 10) == 10.0
    assert history.cost(run, 29, 34) == 12.0, "those that are not logged count like the others"
    assert history.cost(run, 40, 44) is None


def test_the_pairs_are_known_from_a_checkpoint_of_that_update_or_later(folder):
    save(folder, 20, data="more pairs")
    run = read_run(folder)
    assert [history.pairs_of_run(run, update) for update in (5, 15, 25)] == ["pairs", "more pairs", None]


def test_on_another_kind_of_device_what_was_decided_for_it_is_decided_anew(folder, monkeypatch, caplog):
    run = read_run(folder)
    gpu = change(BASE, device="cuda:1", kernels="triton", channels_last="on", offload="on", resume="latest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = history.on_this_machine(gpu, run, {"data": "there"})
    assert (here.runtime.device, here.runtime.kernels, here.runtime.channels_last) == ("auto", "auto", "auto")
    assert here.data.data == "there" and here.output.resume is None and "not bit for bit" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = history.on_this_machine(gpu, run, {})
    assert (here.runtime.device, here.runtime.kernels, here.runtime.offload) == ("auto", "triton", "on")
    assert history.on_this_machine(gpu, run, {"device": "cpu"}).runtime.kernels == "auto"
    cpu = change(BASE, kernels="torch")
    assert history.on_this_machine(cpu, run, {}).runtime.device == "cpu"
    assert history.on_this_machine(cpu, run, {}).runtime.kernels == "torch"
    assert not history.on_this_machine(change(gpu, cuda_graph=True), run, {}).runtime.cuda_graph

"""The end of a run on the embedded world: judged, not judged, and cut short while judging."""

import json
import shutil

import numpy as np
import pytest
import torch

from dpo import train
from dpo.models.load import load
from dpo.tiny import outcome, paths

FLAGS = [
    "--preset",
    "tiny",
    "--steps",
    "1",
    "--batch-size",
    "2",
    "--validate-every",
    "0",
    "--sample-steps",
    "2",
    "--threads",
    "1",
]


def run(folder, *flags) -> int:
    return train.main([*FLAGS, "--output", str(folder), *flags])


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unjudged") / "run"
    assert run(folder, "--no-judge") == 0
    return folder


def test_judging_can_be_left_out(unjudged):
    assert summary(unjudged)["status"] == "finished" and not summary(unjudged)["evaluation"]
    assert (unjudged / "report.html").exists() and (unjudged / "model_index.json").exists()


@pytest.fixture
def few_prompts(monkeypatch):
    """Four instead of all; the pictures of the unchanged model are kept for no other test."""
    monkeypatch.setattr(outcome.prompts, "JUDGED", 4)
    outcome._unchanged.cache_clear()
    yield
    outcome._unchanged.cache_clear()


def test_a_resumed_run_is_judged_and_says_that_nothing_was_left_to_train(unjudged, tmp_path, few_prompts, capsys):
    again = shutil.copytree(unjudged, tmp_path / "run")
    assert train.main(["--output", str(again), "--resume", "latest", "--judge"]) == 0
    assert "update 1 of 1 was made before: nothing is trained; raise --steps to go on" in capsys.readouterr().err
    found = summary(again)["evaluation"]
    assert found["prompts"] == 4 and 0 <= found["win_rate"] <= 1 and found["faithfulness_before"] > 0.7


def test_what_is_judged_is_drawn_by_the_scheduler_of_its_training(few_prompts, monkeypatch):
    seen = []

    def drawn(pipe, captions, seeds):
        seen.append(pipe.scheduler.config.prediction_type)
        return np.zeros((len(captions), 64, 64, 3), dtype=np.uint8)

    monkeypatch.setattr(outcome, "draw", drawn)
    model = load(str(paths.pipeline_path()))
    outcome.judged(model.denoiser, torch.device("cpu"), model.scheduler_config | {"prediction_type": "v_prediction"})
    assert seen == ["epsilon", "v_prediction"]


def test_ctrl_c_while_judging_leaves_the_model_and_its_report(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(outcome, "judged", interrupted)
    folder = tmp_path / "run"
    assert run(folder) == 130
    said = capsys.readouterr().err
    assert "judging was cut short; the aligned model in" in said and f"--output {folder} --resume latest" in said
    assert (
        summary(folder)["status"] == "interrupted" and not summary(folder)["evaluation"]
    )  # a sweep will go on with it
    assert (folder / "report.html").exists() and (folder / "model_index.json").exists()

"""dpo.training.summary: what the pages are made from, for a whole run and for a broken-off one."""

import dataclasses
import json
import math
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo.data.pairs import Subset
from dpo.pages.folder import SHARED
from dpo.settings.config import to_toml
from dpo.settings.flags import parse
from dpo.training import summary
from tests.help.flow import SMALL
from tests.help.running import make_run


@pytest.fixture
def run(world, tmp_path):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2", "--method", "dde", "--steps", "3")
    (run.output / "config.toml").write_text(to_toml(run.config), encoding="utf-8")
    return run


@pytest.mark.parametrize(("flags", "complete", "told"), [
    (("--label-smoothing", "0.1"), False, {"start_loss": pytest.approx(math.log(2)), "start_pull": pytest.approx(0.4)}),
    (("--label-smoothing", "0.1"), True, {}),
    (("--method", "sft"), False, {}),
])  # fmt: skip
def test_a_start_says_where_the_loss_of_its_labels_begins(flags, complete, told):
    config, _ = parse(["--model", "m", "--data", "d", "--output", "o", *flags])
    source = SimpleNamespace(prob=np.ones(3, dtype=np.float32), sides=2)
    run = SimpleNamespace(config=config, source=source, complete=complete, done=3, total=9, device=torch.device("cpu"))
    found = summary.begun(run)
    assert found.pop("device").startswith("CPU, ")
    assert found == {"event": "started", "step": 3, "total": 9, **told}


@pytest.mark.long
def test_what_a_whole_run_leaves(run, world):
    summary.report(run, "finished")
    found = json.loads((run.output / "summary.json").read_text())
    assert (found["status"], found["reason"], found["steps"]) == ("finished", "", 3)
    assert (found["done"], found["taken"]) == (run.done, run.position)
    assert found["model"]["source"] == world("sd15") and found["model"]["prediction type"] == "epsilon"
    assert found["model"]["parameters"] == found["model"]["trained parameters"] > 100_000
    assert found["data"]["usable"] == 48 and found["resolved"]["effective_batch"] == run.nominal
    assert not found["evaluation"] and found["versions"]["torch"] == version("torch")
    tables = json.loads((run.output / "tables.json").read_text())
    assert {name: len(values) for name, values in tables.items()} == dict.fromkeys(
        ["weight", "precision", "table", "correction"], 1000
    )
    assert tables["weight"] == run.step.weight.tolist()
    assert (run.output / "README.md").is_file() and (run.output / "report.html").is_file()


@pytest.mark.long
def test_held_out_pairs_with_a_caption_that_is_trained_on_are_counted(run):
    summary.report(run, "finished")
    before = json.loads((run.output / "summary.json").read_text())["data"]
    assert SHARED not in before
    held = Subset(run.source, np.arange(5))
    summary.report(dataclasses.replace(run, held_out_source=held), "finished")
    found = json.loads((run.output / "summary.json").read_text())["data"]
    assert (found["held out"], found[SHARED]) == (5, 5)


@pytest.mark.long
def test_a_comparison_is_put_in_afterwards_and_stays(run):
    """What is compared is what was saved, when the run itself is gone."""
    summary.report(run, "interrupted", "not compared yet")
    assert not (run.output / "README.md").exists()
    figures = {"win_rate": 0.5, "win_rate_interval": [0.4, 0.6], "prompts": 9, "judge": "b"}
    summary.conclude(run.output, figures, True)
    found = json.loads((run.output / "summary.json").read_text())
    assert (found["status"], found["reason"], found["evaluation"]) == ("finished", "", figures)
    assert "win rate | 0.5" in (run.output / "README.md").read_text("utf-8")
    summary.conclude(run.output, {}, True)
    assert json.loads((run.output / "summary.json").read_text()) == found


@pytest.mark.long
def test_of_which_update_the_result_is_stays_known(run):
    """Of the best weights the update is another than the last; a start that ends otherwise writes none."""
    for done, shown, status in (
        (3, None, "finished"),
        (3, 2, "finished"),
        (1, None, "interrupted"),
        (2, None, "failed"),
    ):
        run.done, run.shown = done, shown
        if status == "finished":
            summary.note_result(run)
            wanted = {"step": shown or done, "of": done}
        summary.report(run, status)
        assert json.loads((run.output / "summary.json").read_text())["result"] == wanted


@pytest.mark.long
def test_a_broken_off_run_has_a_reason_and_no_model_card(run):
    summary.report(run, "failed", "the loss is not finite")
    found = json.loads((run.output / "summary.json").read_text())
    assert (found["status"], found["reason"]) == ("failed", "the loss is not finite")
    assert not (run.output / "README.md").exists() and (run.output / "report.html").is_file()


@pytest.mark.long
def test_parts_that_the_pipeline_came_without_are_named(world, tmp_path, pageless):
    """Of which the card's code has to say so. A pipeline with all of its parts has none."""
    for kind, flags, absent in (
        ("sd3-no-t5", SMALL, {"text_encoder_3": None, "tokenizer_3": None}),
        ("sd15", (), {}),
    ):
        run = make_run(world(kind), world("pairs"), tmp_path / kind, "--batch-size", "2", *flags)
        run.output.mkdir()
        (run.output / "config.toml").write_text(to_toml(run.config), encoding="utf-8")
        summary.report(run, "interrupted")
        assert json.loads((run.output / "summary.json").read_text("utf-8"))["absent"] == absent

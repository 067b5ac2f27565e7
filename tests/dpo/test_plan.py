"""The command: a plan of the embedded world, its JSON, and mistakes in one line."""

import json

import pytest

from dpo import plan
from dpo.planning import recompute, work
from dpo.planning.cuda import room
from dpo.settings.flags import parse
from dpo.train import train_step


@pytest.mark.long
def test_a_plan_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    flags = ["--gpu", "RTX 4090", "--mfu", "0.2", "--pairs", "500", "--lora", "--batch-size", "2", "--json", str(file)]
    assert plan.main(flags) == 0
    told = capsys.readouterr()
    for words in ("LoRA", "at 20% of the peak of RTX 4090", "500 pairs", "24 GB yes", "pairs/s", "= 0.4 epochs of"):
        assert words in told.out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["trained"] < found["parameters"] == 3_827_092 + found["trained"]
    assert (
        found["pairs_per_update"] == 2
        and found["seconds_per_update"] > 0
        and sum(found["memory"].values()) == found["peak"]
    )


@pytest.fixture
def once(monkeypatch):
    """Each step is planned once: that takes seconds."""
    planner, known = work.planner, {}

    def remembering(*given):
        dry = planner(*given)

        def remembered(config):
            if repr(config) not in known:
                known[repr(config)] = dry(config)
            return known[repr(config)]

        return remembered

    monkeypatch.setattr(work, "planner", remembering)
    return known


@pytest.mark.slow
def test_what_checkpointing_auto_chooses_is_said(tmp_path, capsys, once):
    """By the function that a run asks too; the largest micro-batch is that with all blocks computed again."""
    file = tmp_path / "plan.json"
    words = ["--lora", "--batch-size", "2", "--checkpointing", "auto", "--json", str(file)]
    assert plan.main([*words, "--pairs", "4"]) == 0
    told = capsys.readouterr()
    assert "--checkpointing auto is planned as on: with --memory GB the plan says" in told.out
    assert "WARNING 100 updates of 2 pairs are 50 epochs of these 4 pairs" in told.err
    assert json.loads(file.read_text())["checkpointing"] == "on"
    assert plan.main([*words, "--memory", "24"]) == 0
    told = capsys.readouterr().out
    config = work.prepared(parse(words[:-2])[0])
    choice, line = recompute.chosen(config, work.planner(train_step), room(24))
    assert choice.setting == json.loads(file.read_text())["checkpointing"] == "off"
    assert f"--checkpointing auto chooses {line}" in told and "policy, recomputed" not in told
    assert "GiB, all blocks computed again; the same 2 pairs an update)" in told
    assert plan.main([*words, "--device", "cpu"]) == 0
    assert "--checkpointing auto" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "X9"], "--gpu X9: its peak is not known"),
        (["--memroy", "24"], "did you mean --memory?"),
        (["--batch-szie", "2"], "did you mean --batch-size?"),
        (["--mfu", "2"], "2 is not between 0 and 1"),
        (["--price", "nan"], "nan is not above 0"),
        (["--processes", "0"], "0 is not above 0"),
        (["--pairs", "many"], "many is no whole number"),
        (["--memory", "1,5"], "argument --memory: 1,5 is no number"),
        (["--measured", "nowhere"], "name the --output of a run"),
        (["--model", "nobody/nothing"], "cannot get the configs of nobody/nothing"),
        (["--device", "cpu", "--memory", "24"], "leave out --device cpu"),
        (["--json", "nowhere/plan.json"], "nowhere"),
        (["--json", "."], "--json . is a folder"),
        (["--price", "3"], "--price has no effect without hours"),
    ],
)
def test_a_mistake_costs_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.main(flags) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and said in told.err and told.err.startswith("dpo.plan: ")
    assert told.out == ""


def test_under_torchrun_it_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan.main([]) == 2
    assert capsys.readouterr().err == (
        "dpo.plan: started as 2 processes: a plan is made by one; leave out torchrun, and give --processes\n"
    )


@pytest.mark.slow
def test_a_card_that_is_too_small_is_answered_with_changes(capsys):
    assert plan.main(["--preset", "sd15", "--resolution", "256", "--memory", "16"]) == 0
    told = capsys.readouterr()
    assert "largest      " in told.out and "to fit       16 GB, the cheapest change" in told.out and "tried" in told.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "card", "below"),
    [
        ("sdxl-24gb", "24", 23.0),
        ("sdxl-16gb", "16", 14.6),
        ("sd15-12gb", "12", 11.6),
        ("sd15-lora-8gb", "8", 6.0),  # these leave room for a desktop
        ("sdxl-lora-12gb", "12", 9.5),
        ("sdxl-lora-24gb", "24", 18.0),
    ],
)
def test_presets_for_small_gpus_fit_them(preset, card, below, tmp_path, capsys):
    """From the real step on fake tensors, with the estimates of what no tensor shows."""
    assert plan.main(["--preset", preset, "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert found["peak"] / 2**30 < below
    assert found["fits"][card]

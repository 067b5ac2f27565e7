"""dpo.planning.recompute: as little is computed again as fits, the numbers are said, and no plan means all blocks."""

import json
import os
import re

import pytest
import torch

from dpo import train
from dpo.pages.folder import read_run
from dpo.planning import recompute, work
from dpo.planning.cuda import GIB
from dpo.planning.recompute import Choice, Memory
from dpo.planning.sketch import CONFIGS, sketch
from dpo.settings.config import Config, change, flatten
from dpo.settings.flags import parse
from dpo.settings.resolve import dealt
from dpo.training import checkpoint
from dpo.training.parallel import Processes
from tests.dpo.planning.test_work import TAKEN
from tests.help.commands import SMALL, command
from tests.help.processes import codes, commands, together

CONFIG = change(Config(), batch_size=4, device="cuda", precision="bf16", optimizer="adamw8bit", reference="copy")
MIDDLE = {"sd15": "down_blocks.0,up_blocks.3", "sd21": "down_blocks.0,up_blocks.3", "sdxl": "down_blocks.1,up_blocks.1"}


def dry(config):
    """20 GiB and of each pair 8, 4 or 1, by what is computed again."""
    pair = {"off": 8, "on": 1}.get(config.runtime.checkpointing, 4)
    peak = int((20 + pair * config.optim.batch_size) * GIB)
    return dealt(config, 1), TAKEN.__class__(**{**vars(TAKEN), "peak": peak, "parts": {}})


@pytest.mark.parametrize("kind", MIDDLE)
def test_the_outermost_blocks_with_attention_stand_between_none_and_all(kind):
    unet = json.loads((CONFIGS / kind / "unet" / "config.json").read_text())
    assert recompute.levels(unet) == ("off", MIDDLE[kind], "on")
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    assert recompute.levels(plain) == ("off", "on")


@pytest.mark.parametrize("kind", ["sd35-medium", "flux-dev", "flux2-klein-4b", "qwen-image"])
def test_a_transformer_has_all_its_blocks_computed_again_or_none(kind):
    shape = json.loads((CONFIGS / kind / "transformer" / "config.json").read_text())
    assert recompute.levels(shape) == ("off", "on")


def test_as_little_as_fits():
    settings, peaks = ("off", MIDDLE["sdxl"], "on"), {}
    for setting in settings:
        peaks[setting] = work.plan(change(CONFIG, checkpointing=setting), recompute.Asked(), dry).peak
    assert peaks["off"] > peaks[MIDDLE["sdxl"]] > peaks["on"]
    for setting in settings[:-1]:
        assert recompute.lightest(CONFIG, settings, peaks[setting], dry) == (setting, peaks[setting])
    assert recompute.lightest(CONFIG, settings, peaks[settings[1]] - 1, dry) == ("on", None), (
        "the last is taken unplanned"
    )


@pytest.fixture
def small(world):
    return change(CONFIG, model=world("sd15"), data="pairs")


@pytest.mark.parametrize(
    ("free", "setting", "words"),
    [
        (None, "off", "on a CPU"),
        (100, "off", r"off \(planned 5\d\.\d of 100\.0 GiB\)"),
        (40, "down_blocks.", r"\(planned 3\d\.\d of 40\.0 GiB\)"),
        (5, "on", r"less does not fit 5\.0 GiB by the plan"),
    ],
)
def test_the_choice_and_its_numbers_are_said(small, free, setting, words):
    choice, line = recompute.at_start(small, dry, free and free * GIB)
    assert choice.setting.startswith(setting) and line.startswith("checkpointing: ")
    assert re.search(words, line)


def test_a_model_whose_shape_is_not_known_has_all_computed_again(small):
    choice, line = recompute.at_start(change(small, model="/nowhere"), dry, GIB)
    assert choice.setting == "on" and "no plan can be made" in line


def test_what_a_plan_does_not_count_has_all_computed_again(small):
    choice, line = recompute.at_start(change(small, cuda_graph=True), dry, 1000 * GIB)
    assert choice == ("on", None) and "a plan does not count the memory that --cuda-graph keeps" in line


WAYS = {
    "lora": ({"lora": True, "reference": "adapter"}, 1),
    "buckets": ({"buckets": True, "resolution": 64}, 1),
    "release": ({"gradient_release": True, "batch_size": 2}, 1),
    "sharding": ({"sharding": "on", "optimizer": "adamw", "precision": "fp32"}, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_choice_follows_the_real_step_whatever_is_trained(small, way):
    """What is chosen fits by a plan of the step itself, and what would compute less again does not."""
    changes, processes = WAYS[way]
    config, plans = change(small, **changes), work.planner(train.train_step, processes)
    off, middle, _ = recompute.levels(sketch(config.model).denoiser.config)
    most, less = (work.plan(change(config, checkpointing=each), work.Asked(), plans).peak for each in (off, middle))
    assert most > less
    assert recompute.at_start(config, plans, most)[0] == (off, most)
    assert recompute.at_start(config, plans, most - 1)[0] == (middle, less)
    assert recompute.at_start(config, plans, less - 1)[0] == ("on", None)


def test_a_run_has_decided_before_it_loads_anything(small, monkeypatch):
    seen = []
    monkeypatch.setattr(recompute, "memory_of", lambda device: Memory(40 * GIB, 80 * GIB))
    monkeypatch.setattr(recompute, "at_start", lambda config, dry, room: seen.append(room) or (Choice("on", 1), "said"))
    monkeypatch.setattr("dpo.training.loop.train", lambda config, notes, *rest: seen.append((config, notes)) or 0)
    assert train.to_its_end(change(small, checkpointing="auto", device="cpu"), ["first"]) == 0
    room, (config, notes) = seen
    assert room == 40 * GIB and config.runtime.checkpointing == "on" and notes == ["first", "said"]


def test_of_several_processes_the_smallest_gpu_decides_and_one_plans(small, tmp_path, monkeypatch):
    """Before anything is loaded the processes have to find each other."""
    rooms = {"0": 100 * GIB, "1": 40 * GIB}
    monkeypatch.setattr(recompute, "memory_of", lambda device: Memory(rooms[os.environ["RANK"]], 100 * GIB))

    def planned(config, dry, room):
        assert os.environ["RANK"] == "0"
        return Choice("on", None), f"{room / GIB:g}"

    monkeypatch.setattr(recompute, "at_start", planned)
    config = change(small, device="cpu", checkpointing="auto")
    said = together(2, lambda processes: recompute.decided(config, train.train_step, processes)[1], tmp_path)
    assert said == ["40", "40"]


@pytest.mark.parametrize("which", ["latest", "the run", "the checkpoint"])
def test_a_resumed_run_keeps_what_it_had(small, tmp_path, monkeypatch, which):
    monkeypatch.setattr(recompute, "memory_of", lambda device: pytest.fail("nothing is decided anew"))
    monkeypatch.setattr(train, "train_step", lambda *given: pytest.fail("nothing is planned"))
    place = tmp_path / "run" / "checkpoints" / "step-00000003"
    checkpoint.save(place, {}, {"config": flatten(change(small, checkpointing=MIDDLE["sd15"]))})
    named = {"latest": "latest", "the run": str(tmp_path / "run"), "the checkpoint": str(place)}[which]
    output = tmp_path / ("run" if which == "latest" else "elsewhere")
    config = change(small, device="cpu", checkpointing="auto", output=str(output), resume=named)
    config, line = recompute.decided(config, train.train_step, Processes())
    assert config.runtime.checkpointing == MIDDLE["sd15"] and f"{MIDDLE['sd15']}, as the run had it" in line


FLAGS = {
    "lora": ["--lora"],
    "buckets": ["--buckets"],
    "release": ["--gradient-release"],
    "sharding": ["--sharding", "on", "--optimizer", "adamw"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", FLAGS)
def test_from_the_command_to_a_resume_with_the_same_flags(world, tmp_path, monkeypatch, capsys, pageless, way):
    """What was decided trains, stands in the run's settings, and is not decided anew where memory has changed."""
    out = tmp_path / "out"
    words = [
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--output",
        out,
        *SMALL,
        "--batch-size",
        "2",
        *FLAGS[way],
    ]
    words = [str(word) for word in (*words, "--checkpointing", "auto", "--no-samples", "--checkpoint-every", "1")]
    config, _ = parse(words)
    off, middle, _ = recompute.levels(sketch(config.model).denoiser.config)
    count = 2 if way == "sharding" else 1
    most = work.plan(change(config, checkpointing=off), work.Asked(), work.planner(train.train_step, count)).peak
    for steps, room in (("1", most - 1), ("2", 2 * most)):
        monkeypatch.setattr(recompute, "memory_of", lambda device, room=room: Memory(room, room))
        if count == 1:
            said = command(capsys, *words, "--steps", steps, "--resume", "latest")
            assert said.code == 0 and [line for line in said.log if f"checkpointing: {middle}" in line], said
        else:
            assert codes(commands(2, [*words, "--steps", steps, "--resume", "latest"], tmp_path)) == [0, 0]
        assert read_run(out).setting("checkpointing") == middle
    log = "\n".join(said.log) if count == 1 else (tmp_path / "said-0").read_text()
    assert f"checkpointing: {middle}, as the run had it" in log


def test_with_nothing_to_go_on_from_it_is_decided(small, tmp_path):
    config = change(small, device="cpu", checkpointing="auto", output=str(tmp_path), resume="latest")
    assert recompute.decided(config, train.train_step, Processes())[0].runtime.checkpointing == "off"


def test_a_gpus_memory_is_what_is_free_and_what_this_process_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    assert recompute.memory_of(torch.device("cuda:1")) == Memory(7 * GIB, 24 * GIB)
    assert recompute.memory_of(torch.device("cpu")) is None

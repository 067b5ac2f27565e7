"""dpo.planning.recompute: as little is computed again as fits, the numbers are said, and no plan means all blocks."""

import json
import os

import pytest

from dpo import train
from dpo.common.errors import OutOfMemory, UserError
from dpo.planning import recompute, work
from dpo.planning.cuda import GIB
from dpo.planning.sketch import CONFIGS
from dpo.settings.config import Config, change
from dpo.settings.resolve import dealt
from tests.dpo.planning.test_work import TAKEN
from tests.help.processes import together

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
    settings, peaks = ("off", "middle", "on"), {}
    settings = ("off", MIDDLE["sdxl"], "on")
    for setting in settings:
        peaks[setting] = work.plan(change(CONFIG, checkpointing=setting), recompute.Asked(), dry).peak
    assert peaks["off"] > peaks[MIDDLE["sdxl"]] > peaks["on"]
    for setting in settings[:-1]:
        assert recompute.lightest(CONFIG, settings, peaks[setting], dry) == (setting, peaks[setting])
    assert recompute.lightest(CONFIG, settings, peaks[settings[1]] - 1, dry) == ("on", None), (
        "the last is taken unplanned"
    )


def unknown(config):
    raise UserError("no such model")


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
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(line)


def test_a_model_whose_shape_is_not_known_has_all_computed_again(small):
    choice, line = recompute.at_start(change(small, model="/nowhere"), dry, GIB)
    assert choice.setting == "on" and "no plan can be made" in line


def test_a_run_has_decided_before_it_loads_anything(small, monkeypatch):
    seen = []
    monkeypatch.setattr(recompute, "free_memory", lambda device: 40 * GIB)
    monkeypatch.setattr(
        recompute, "at_start", lambda config, dry, free: seen.append(free) or (recompute.Choice("on", 1), "said")
    )
    monkeypatch.setattr("dpo.training.loop.train", lambda config, notes, *rest: seen.append((config, notes)) or 0)
    assert train.to_its_end(change(small, checkpointing="auto", device="cpu"), ["first"]) == 0
    free, (config, notes) = seen
    assert free == 40 * GIB and config.runtime.checkpointing == "on" and notes == ["first", "said"]


def test_a_first_update_that_does_not_fit_names_what_would(small, monkeypatch):
    from dpo.training import loop

    def full(*args, at_first=True):
        raise OutOfMemory("out of GPU memory: lower --batch-size", at_first=at_first)

    monkeypatch.setattr(loop, "train", full)
    monkeypatch.setattr(train, "fitting_instead", lambda config: "; by the plan this would fit: X (3.0 GiB)")
    with pytest.raises(UserError, match=r"^out of GPU memory: lower --batch-size; by the plan this would fit: X"):
        train.to_its_end(small, [])
    monkeypatch.setattr(loop, "train", lambda *args: full(at_first=False))
    with pytest.raises(UserError, match="lower --batch-size$"):
        train.to_its_end(small, [])
    said = recompute.what_fits(small, dry, 30)
    assert said.startswith("by the plan this would fit: ") and "--checkpointing on" in said and "GiB" in said
    assert recompute.what_fits(small, dry, 1) == "" and recompute.what_fits(small, unknown, 30) == ""


def test_of_several_processes_the_smallest_gpu_decides(small, tmp_path, monkeypatch):
    """Before anything is loaded the processes have to find each other."""
    free = {"0": 100 * GIB, "1": 40 * GIB}
    monkeypatch.setattr(recompute, "free_memory", lambda device: free[os.environ["RANK"]])
    monkeypatch.setattr(
        recompute, "at_start", lambda config, dry, free: (recompute.Choice("on", None), f"{free / GIB:g}")
    )
    said = together(2, lambda processes: train.recomputing(change(small, device="cpu"), processes)[1], tmp_path)
    assert said == ["40", "40"]

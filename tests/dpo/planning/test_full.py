"""dpo.planning.full: a first update that does not fit ends with one line, which says what would fit, or why that is not known."""

import pytest
import torch

from dpo import train
from dpo.common.errors import UserError
from dpo.planning import cuda, fitting, full, recompute, work
from dpo.planning.asked import Asked
from dpo.planning.cuda import GIB
from dpo.planning.recompute import Memory
from dpo.settings.config import change
from dpo.settings.flags import parse
from dpo.training import build
from dpo.training.parallel import Processes
from tests.dpo.planning.test_recompute import CONFIG, dry
from tests.help.commands import SMALL, check_refused, command
from tests.help.processes import codes, commands, end

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")


@pytest.fixture
def small(world):
    return change(CONFIG, model=world("sd15"), data="pairs")


def unknown(config):
    raise UserError("no such model")


def test_the_cheapest_change_is_named_or_that_there_is_none(small):
    said = full.what_fits(small, dry, Memory(28 * GIB, 29 * GIB))
    assert said.startswith("by the plan this would fit 28.0 GiB: ") and "--checkpointing on" in said
    assert full.what_fits(small, dry, Memory(GIB, GIB)) == "the plan knows no change that fits 1.0 GiB"
    assert full.what_fits(small, unknown, Memory(30 * GIB, 31 * GIB)) == ""


def test_where_the_plan_fits_the_message_says_so(small):
    said = full.what_fits(small, dry, Memory(100 * GIB, 101 * GIB))
    assert said.startswith("the plan says that 54.3 GiB are enough, and 100.0 GiB were there: it counts too little")


def test_what_other_programs_hold_is_said_where_it_matters(small):
    said = full.what_fits(small, dry, Memory(30 * GIB, 80 * GIB))
    assert said.startswith(
        "another program holds 49.5 GiB of this GPU: without it the plan's 54.3 GiB would fit; by the"
    )
    assert "another program" not in full.what_fits(small, dry, Memory(30 * GIB, 40 * GIB)), (
        "it would not fit alone either"
    )
    assert "another program" not in full.what_fits(small, dry, Memory(54 * GIB, 55 * GIB)), (
        "its own context is no other"
    )


def test_it_is_planned_for_the_processes_there_are(small, monkeypatch):
    """Of several processes gradient release is no way out, so the search has to know how many train."""
    asked = []
    monkeypatch.setattr(full.fitting, "cheapest", lambda config, about, *rest: asked.append(about.processes))
    full.what_fits(small, dry, Memory(28 * GIB, 29 * GIB), 2)
    assert asked == [2]


def test_ctrl_c_leaves_the_message_without_the_plan(small, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(recompute, "memory_of", lambda device: Memory(GIB, GIB))
    monkeypatch.setattr(full, "what_fits", interrupted)
    assert full.instead(change(small, device="cpu"), train.train_step, Processes()) == ""


def test_a_plan_that_breaks_leaves_the_message_as_it_is(small, monkeypatch, caplog):
    def broken(*given):
        raise RuntimeError("fake tensors\ndo not do that")

    monkeypatch.setattr(recompute, "memory_of", lambda device: Memory(GIB, GIB))
    monkeypatch.setattr(full, "what_fits", broken)
    assert full.instead(change(small, device="cpu"), train.train_step, Processes()) == ""
    assert "cannot be planned (fake tensors)" in caplog.text


@pytest.mark.parametrize(
    "asked", [{"buckets": True}, {"method": "kto", "kto_center": "batch", "accumulation": 1, "effective_batch": None}]
)
def test_no_change_is_tried_that_the_settings_refuse(small, asked):
    assert full.what_fits(change(small, **asked), dry, Memory(28 * GIB, 29 * GIB)).startswith("by the plan this would")


@pytest.fixture
def planted(monkeypatch):
    """A function that plants the failure into the real step of a run, not into that of a plan, and says what memory there is."""
    step = train.train_step

    def plant(number, memory):
        def failing(run, batches):
            if len(run.source) and run.done == number - 1:  # a plan's step has no pairs
                raise FULL
            return step(run, batches)

        monkeypatch.setattr(train, "train_step", failing)
        monkeypatch.setattr(recompute, "memory_of", lambda device: memory)

    return plant


@pytest.fixture
def words(world, tmp_path):
    flags = ["--batch-size", "2", "--steps", "2", "--checkpoint-every", "1", "--no-samples"]
    return ["--model", world("sd15"), "--data", world("pairs"), "--output", str(tmp_path / "out"), *SMALL, *flags]


@pytest.mark.slow
def test_a_first_update_that_is_out_of_memory_ends_with_what_would_fit(words, planted, capsys, monkeypatch, pageless):
    """From the allocator's error through the loop and the command to one line."""
    monkeypatch.setattr(fitting, "CHANGES", fitting.CHANGES[:1])  # each one more is a plan more
    config, _ = parse(words)
    room = work.plan(config, Asked(), work.planner(train.train_step)).peak - 1
    planted(1, Memory(room, 24 * GIB))
    said = command(capsys, *words)
    check_refused(
        said,
        [
            "out of GPU memory: lower --batch-size",
            "another program holds 22.",
            "by the plan this would fit 0.8 GiB: --",
        ],
    )
    assert said.warnings("planning what would fit") and said.warnings("checkpoint ")
    planted(2, Memory(0, 0))
    said = command(capsys, *words, "--overwrite")
    check_refused(said, ["out of GPU memory"])
    assert "by the plan" not in said.errors[0] and "the plan" not in said.errors[0], "one update has fitted"


@pytest.mark.slow
def test_memory_that_is_full_before_the_first_update_is_no_other_thing(words, planted, capsys, monkeypatch, pageless):
    planted(1, Memory(cuda.GIB // 8, cuda.GIB // 4))

    def loading(*given, **named):
        raise FULL

    monkeypatch.setattr(build, "load_model", loading)
    check_refused(command(capsys, *words), ["out of GPU memory", "the plan knows no change that fits 0.1 GiB"])


@pytest.mark.slow
def test_of_several_processes_one_says_it(words, planted, tmp_path, pageless):
    planted(1, Memory(100 * GIB, 101 * GIB))
    children = commands(2, words, tmp_path)
    try:
        assert codes(children) == [2, 2]
    finally:
        end(children)
    said = "".join((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    assert said.count("out of GPU memory: lower") == said.count("GiB are enough, and 100.0 GiB were there") == 1

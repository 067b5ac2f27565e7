"""dpo.common.device: nothing is read from a copy that may still be under way."""

import sys
import traceback
from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dpo.common.device import moved
from dpo.training import validation
from dpo.training.state import snapshot
from tests.help.running import advance, make_run


class CopiesToTheHost(TorchFunctionMode):
    """Notes the copies of ours that do not wait. Where the training device is the CPU too, each goes to the host.

    What diffusers and transformers do when they load a model on the CPU goes from the host to itself on any machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.found: list[str] = []

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("to", "copy_", "cpu", "type"):
            self.calls += 1
            at_once = kwargs.get("non_blocking") or any(value is True for value in args[1:])
            if at_once and "site-packages/accelerate" not in sys._getframe(1).f_code.co_filename:
                self.found.append("".join(traceback.format_stack(limit=4)))
        return func(*args, **kwargs)


def test_it_waits_for_the_host_and_not_for_a_gpu():
    x = torch.zeros(2, dtype=torch.float64)
    with CopiesToTheHost() as watch:
        x.to("cpu", non_blocking=True)
        x.to("cpu", torch.float32, True)
        torch.empty(2).copy_(x, non_blocking=True)
    assert len(watch.found) == 3
    with CopiesToTheHost() as watch:
        assert moved(x, "cpu", torch.float32).dtype == torch.float32
        assert watch.calls and not watch.found
        assert moved(x, "meta").device.type == "meta" and len(watch.found) == 1


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--optimizer", "adamw8bit", "--ema", "0.9"], ["--lora", "--method", "dde"]])
def test_no_copy_to_the_host_is_read_before_it_is_there(world, tmp_path, flags):
    """A step, held-out accuracy and a checkpoint."""
    held_out = ["--validate-every", "1", "--validation-fraction", "0.2", "--validation-draws", "1"]
    with CopiesToTheHost() as watch:
        run = make_run(world("sd15"), world("pairs"), tmp_path / "out", "--batch-size", "2", *held_out, *flags)
        advance(run, 1)
        validation.accuracy(run.step, run.held_out)
        snapshot(run)
    assert watch.calls > 50
    assert watch.found == [], watch.found[0]

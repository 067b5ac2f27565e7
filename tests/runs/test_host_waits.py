"""Invariants: nothing in a micro-step waits for the device, and nothing is read from it before it has arrived.

Shown without a GPU: the micro-step runs on fake tensors, which have no values, so whatever would read one (.item(), a
branch on a tensor, a mask as an index) raises. Covered: forward, loss, backward, table sums and metrics, of every method
and family, and the update inside backward. Not covered: the encoders, the update after the last micro-step, own kernels
(plain torch stands for them), and copies from the host, which wait where their memory is not page-locked.

The other side of that coin: a copy to the host that does not wait is read too early. On a CPU such a copy is no
operation at all, so the calls themselves are watched: none towards the host asks not to wait.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from dpo.methods import METHODS
from dpo.training import validation
from dpo.training.state import snapshot
from tests.help.flow import SMALL, TRAINED
from tests.help.running import advance, make_run

WAITS = (DataDependentOutputException, DynamicOutputShapeException)
PATHS = {
    "dpo": [],
    "dde": ["--method", "dde"],
    "sft": ["--method", "sft"],
    "lora with dropout": ["--lora", "--lora-dropout", "0.5"],
    "bf16 autocast": ["--precision", "bf16"],
    "checkpointing": ["--checkpointing", "on"],
    "gradient release": ["--gradient-release"],
}


def micro_step(run, recorded=None):
    """One micro-step of `run` on fake tensors, gradients and figures included."""
    batches = run.batches()
    inputs, correction, rate = run.encoder.inputs(next(batches)), run.correction(), run.learning_rate()
    batches.close()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def faked(value):
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        inputs = inputs._replace(
            **{name: faked(value) for name, value in inputs._asdict().items() if name != "text"},
            text=type(inputs.text)(*map(faked, inputs.text)),
        )
        terms = run.step(inputs, faked(correction), faked(recorded))
        run.updater.backward(terms.loss.sum() / run.nominal, rate, 1.0)
        run.table.gather(terms.table_sum, terms.table_count)
        run.metrics.add(terms, inputs.prob, inputs.usable)


SLOW = (
    "dpo",
    "sft",
    "checkpointing",
    "bf16 autocast",
    "lora with dropout",
    "gradient release",
)  # to test each time; dde does all that dpo does


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, flags in PATHS.items()],
)
def test_no_method_waits_for_the_device(world, tmp_path, flags):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2", *flags)
    micro_step(run)
    if run.updater.release is None:  # which leaves no gradient
        assert any(p.grad is not None for p in run.updater.parameters)  # it went to the end


@pytest.mark.long
def test_a_recorded_reference_waits_for_no_device(world, tmp_path):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2")
    run.step.reference = None
    micro_step(run, torch.zeros(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in PATHS])
def test_no_other_table_waits_for_the_device(world, tmp_path, method):
    """These methods differ from the ones above by the values of their tables."""
    micro_step(make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2", "--method", method))


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        "sdxl",
        TRAINED[0],
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*TRAINED[1:], "sd2v", "sdxl-turbo")),
    ],
)
def test_no_family_waits_for_the_device(world, tmp_path, kind):
    micro_step(
        make_run(world(kind), world("pairs"), tmp_path, "--batch-size", "2", *(SMALL if kind in TRAINED else ()))
    )


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x[x > 0]])
def test_a_wait_raises(wait):
    """The tests above can fail."""
    with FakeTensorMode(), pytest.raises(WAITS):
        wait(torch.zeros(2))


class TooEarly(TorchFunctionMode):
    """Inside `with` the calls are kept that copy to the host and do not wait for the copy."""

    def __init__(self):
        super().__init__()
        self.found, self.copies = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.copy_, Tensor.cpu):
            self.copies += 1
            asked = kwargs.get("non_blocking", False) or any(value is True for value in args[1:])
            target = args[0] if func is Tensor.copy_ else result
            if asked and target.device.type == "cpu":
                self.found.append((func, args[1:], kwargs))
        return result


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [[], ["--lora", "--ema", "0.9", "--method", "dde", "--precision", "bf16"]], ids=["full", "lora"]
)
def test_no_copy_to_the_host_is_read_too_early(world, tmp_path, flags):
    held = ["--validation-fraction", "0.3", "--validate-every", "1", "--validation-draws", "1"]
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2", *held, *flags)
    with TooEarly() as watched:
        advance(run, 1)
        validation.differences(run.step, run.held_out)
        snapshot(run)
    assert watched.copies > 50 and not watched.found


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(2).copy_(x, non_blocking=True),
        lambda x: torch.empty(2).copy_(x, True),
        lambda x: x.to(torch.device("cpu"), torch.float32, True),
    ],
)
def test_a_copy_that_does_not_wait_is_found(copy):
    with TooEarly() as watched:
        copy(torch.ones(2))
    assert len(watched.found) == 1

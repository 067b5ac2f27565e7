"""dpo.training.graph: replays of a captured micro-step train as the micro-step does. By a stand-in for torch.cuda's graphs.

The stand-in has what makes a graph hard: it knows operations and addresses alone. It notes each operation with the
tensors it read and wrote, takes back what they did, and a replay does them again in those tensors. No Python of the
micro-step runs again.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo.common.errors import UserError
from dpo.data.batch import Decoding
from dpo.data.batches import batches
from dpo.data.loader import Reading
from dpo.data.order import Order
from dpo.train import train_step
from dpo.training.graph import Graphs
from tests.help.running import everything, make_run


class FakeGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor of Python numbers is a copy from the host"
        if func._schema.is_mutable:
            self.before += [(t, t.clone()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def take_back(self):
        """A capture only notes what is to be done."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            for there, value in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(there, torch.Tensor) and not torch._C._is_alias_of(there, value):
                    there.copy_(value)


@contextmanager
def capture(graph, pool, stream, capture_error_mode):
    assert (pool, capture_error_mode) == ("pool", "thread_local")
    with graph:
        yield
    graph.take_back()


class FakeStream:
    def __init__(self, device):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    for name, value in {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda s: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def trained(run, updates=2):
    """Everything that a run has after updates of two shapes, the second of which comes in the middle of one; figures."""
    wide, narrow = (
        batches(run.source, Order(0, 0, size), Decoding.of(run.config.data, 0), Reading.of(run.config.data))
        for size in (2, 1)
    )
    figures = []
    for _ in range(updates):
        figures.append(train_step(run, [next(wide), next(narrow), next(wide)]))
        run.done += 1
    wide.close(), narrow.close()
    return everything(run), figures


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        "--method dde --lora --lora-dropout 0.5 --checkpointing on --ema 0.9 --optimizer adamw8bit",
        pytest.param("--method dde", marks=pytest.mark.slow),
        pytest.param("--precision bf16-pure", marks=pytest.mark.slow),
        pytest.param("--precision bf16", marks=pytest.mark.slow),
        pytest.param("--method sft", marks=pytest.mark.slow),
    ],
)
def test_replays_train_as_the_micro_step_does(world, tmp_path, cuda, flags):
    """Weights, states and table of two updates, over accumulation, two shapes and dropped gradients."""
    flags = ["--batch-size", "2", "--accumulation", "3", "--learning-rate", "1e-3", *flags.split()]
    plain, captured = (make_run(world("sd15"), world("pairs"), tmp_path / name, *flags) for name in ("a", "b"))
    captured.graphs = Graphs(captured.step, captured.updater, captured.nominal)
    expected, figures = trained(plain)
    found, again = trained(captured)
    assert again == figures and len(captured.graphs._captured) == 2
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.long
def test_terms_outlive_the_next_replay_and_a_failed_capture_is_one_line(world, tmp_path, cuda, monkeypatch):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2", "--lora")
    stream = run.batches()
    first, second = (run.encoder.inputs(next(stream)) for _ in range(2))
    stream.close()
    graphs = Graphs(run.step, run.updater, run.nominal)
    terms = graphs(first, run.correction())
    kept = terms.timesteps.clone(), terms.errors.clone()
    assert not torch.equal(graphs(second, run.correction()).errors, kept[1])
    assert torch.equal(terms.timesteps, kept[0]) and torch.equal(terms.errors, kept[1])

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(UserError, match="cannot be captured here .*; leave --cuda-graph out") as caught:
        Graphs(run.step, run.updater, run.nominal)(first, run.correction())
    assert "\n" not in str(caught.value)

"""Invariants: randomness is keyed, so micro-batch size and workers do not matter; nothing waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.common.errors import UserError
from tests.help.flow import SMALL, TRAINED
from tests.help.running import advance, make_run, weights

CUTS = [(8, 1, 0), (4, 2, 0), (1, 8, 0), (4, 2, 2)]


@pytest.mark.parametrize(
    "kind, precision, tolerance",
    [
        ("sd15", "fp64", 1e-9),
        pytest.param("sd15", "fp32", 2e-5, marks=pytest.mark.slow),
        *(pytest.param(kind, "fp64", 1e-9, marks=pytest.mark.slow) for kind in TRAINED),
    ],
)
@pytest.mark.parametrize("method", ["dde"])
def test_the_cut_into_micro_batches_and_workers_do_not_matter(world, tmp_path, kind, method, precision, tolerance):
    results = []
    for batch, accumulation, workers in CUTS:
        flags = ["--batch-size", str(batch), "--accumulation", str(accumulation), "--workers", str(workers)]
        # Adam's first updates are nearly signs and magnify the order of sums: a small learning rate keeps that small
        flags += [
            "--precision",
            precision,
            "--method",
            method,
            "--learning-rate",
            "1e-4",
            "--eps",
            "1e-4",
            "--flip",
            "--crop",
            "random",
            *(SMALL if kind in TRAINED else ()),
        ]
        run = make_run(world(kind), world("pairs"), tmp_path / f"{batch}-{workers}", *flags)
        advance(run, 3)
        results.append((weights(run), run.table.table.clone()))
    (expected, table), *others = results
    for found, other_table in others:
        assert max((found[name] - expected[name]).abs().max().item() for name in expected) < tolerance
        assert torch.allclose(other_table, table, atol=tolerance)


@pytest.mark.long
def test_dropout_inside_adapters_is_keyed(world, tmp_path):
    """Neither the cut nor recomputation nor what was drawn from the global generator changes it; evaluation is whole."""
    results = []
    for name, flags in {
        "whole": ["--batch-size", "4"],
        "cut": ["--batch-size", "2", "--accumulation", "2"],
        "recomputed": ["--batch-size", "4", "--checkpointing", "on"],
    }.items():
        flags = [*flags, "--precision", "fp64", "--learning-rate", "1e-3", "--eps", "1e-4", "--lora"]
        run = make_run(world("sd15"), world("pairs"), tmp_path / name, *flags, "--lora-dropout", "0.3")
        torch.rand(len(results))
        advance(run, 2)
        results.append(weights(run))
    for found in results[1:]:
        assert max((found[name] - results[0][name]).abs().max().item() for name in found) < 1e-12
    inputs = run.encoder.inputs(next(run.batches()))
    with torch.no_grad():
        (first, _), (second, _) = (run.step.errors(inputs, run.correction()) for _ in range(2))
    trained, _ = run.step.errors(inputs, run.correction())
    assert torch.equal(first.errors, second.errors) and not torch.equal(first.errors[:2], trained.errors[:2])
    assert torch.equal(first.errors[2:4], trained.errors[2:4]), "the reference has no dropout"


class Synchronisations(TorchDispatchMode):
    """Counts operations that bring a value of the device to the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, flags",
    [
        ("sd15", ["--method", "dde"]),
        ("sdxl", ["--lora", "--lora-dropout", "0.1"]),
        ("sd2v", ["--method", "sft"]),
        *((kind, ["--lora", *SMALL]) for kind in TRAINED),
    ],
)
def test_a_micro_step_never_waits_for_the_device(world, tmp_path, monkeypatch, kind, flags):
    run = make_run(world(kind), world("pairs"), tmp_path, "--batch-size", "2", *flags)
    batch = next(run.batches())
    calls = []
    for name in ("cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "item"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, _o=original, _n=name, **k: (calls.append(_n), _o(*a, **k))[1]
        )
    inputs = run.encoder.inputs(batch)
    calls.clear()  # tokenizers build Python lists: that is host work before the device has any
    with Synchronisations() as watch:
        terms = run.step(inputs, run.correction())
        run.updater.backward(terms.loss.sum() / run.nominal)
        run.table.gather(terms.table_sum, terms.table_count)
        run.metrics.add(terms, inputs.prob, inputs.usable)
    assert watch.seen == [] and calls == []
    monkeypatch.undo()
    with Synchronisations() as watch:
        terms.loss.sum().item()
    assert watch.seen == ["_local_scalar_dense"]


@pytest.mark.long
def test_holes_count_nowhere(world, tmp_path):
    """A batch with holes gives the update of the same pairs without them."""
    run = make_run(
        world("sd15"), world("pairs"), tmp_path / "a", "--batch-size", "4", "--precision", "fp64", "--method", "dde"
    )
    whole = next(run.batches())
    whole.usable[2] = 0.0
    from dpo.train import train_step

    figures = train_step(run, [whole])
    assert figures["pairs"] == 3
    other = make_run(
        world("sd15"), world("pairs"), tmp_path / "b", "--batch-size", "4", "--precision", "fp64", "--method", "dde"
    )
    keep = torch.tensor([0, 1, 3])
    both = torch.cat([keep, keep + 4])
    batch = next(other.batches())
    for name in ("keys", "draws", "prob", "usable"):
        setattr(batch, name, getattr(batch, name)[keep])
    batch.pixels, batch.micro = batch.pixels[both], batch.micro[both]
    batch.captions = [batch.captions[i] for i in keep]
    batch.indices = None  # cut by hand: nothing of it is kept
    train_step(other, [batch])
    found, expected = weights(run), weights(other)
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-12
    assert torch.allclose(run.table.table, other.table.table, atol=1e-14)


def test_sft_sees_the_winners_only(world, tmp_path):
    """The gradient of sft is that of the winners' mean error, and the losers are not computed."""
    run = make_run(
        world("sd15"), world("pairs"), tmp_path, "--batch-size", "3", "--method", "sft", "--precision", "fp64"
    )
    inputs = run.encoder.inputs(next(run.batches()))
    rows = []
    unet = run.step.policy
    run.step.policy = lambda x_t, *args, **kwargs: (rows.append(len(x_t)), unet(x_t, *args, **kwargs))[1]
    terms = run.step(inputs, run.correction())
    assert rows == [3]
    assert torch.equal(terms.loss, terms.errors[0]) and terms.loss.isfinite().all()
    without = (terms.logit, terms.difference, terms.accuracy, *terms.errors[1:])
    assert all(x.isnan().all() for x in without)  # which are of a reference or of both images: no figure shows them
    terms.loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in run.updater.parameters)
    run.step.policy = unet
    both, _ = run.step.errors(inputs, run.correction())
    assert torch.allclose(both.errors[0], terms.loss, rtol=1e-12) and both.errors[1].isfinite().all()


def test_several_processes_are_refused_in_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes"):
        make_run(world("sd15"), world("pairs"), tmp_path)

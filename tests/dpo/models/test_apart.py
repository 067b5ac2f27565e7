"""dpo.models.apart: the samples of a batch on a core each give what the whole batch gives, and the same every time."""

import math

import pytest
import torch
from torch import nn

from dpo.common.cores import SMALL, Cores
from dpo.models.apart import Apart, cores_for
from dpo.models.family import TextEncoding
from dpo.training.state import snapshot
from tests.help.running import advance, everything, make_run


@pytest.fixture
def two_threads():
    """Two threads of torch, whatever the machine has: one after another they compute the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Network(nn.Module):
    """Mixes what a denoiser is given, each sample by itself; one weight is not used."""

    def __init__(self):
        super().__init__()
        self.inside, self.caption = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(5, 8)
        self.outside, self.unused = nn.Conv2d(8, 4, 3, padding=1), nn.Parameter(torch.ones(3))

    def forward(self, x_t, t, text, sizes):
        told = self.caption(text.hidden.mean(1)) + (0 if sizes is None else sizes.sum(1, keepdim=True) / 100)
        return self.outside(torch.tanh(self.inside(x_t) + told[:, :, None, None] + t[:, None, None, None] / 1000))


def asked(samples, dtype=torch.float64, sizes=False):
    made = torch.Generator().manual_seed(1)
    x_t = torch.randn(samples, 4, 6, 6, generator=made, dtype=dtype)
    text = TextEncoding(torch.randn(samples, 3, 5, generator=made, dtype=dtype))
    return x_t, torch.arange(samples) * 7, text, torch.arange(6 * samples).view(samples, 6) if sizes else None


def gradients(network, denoise, given):
    network.zero_grad(set_to_none=True)
    for _ in range(2):  # two passes of an update add up
        denoise(*given).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize(("samples", "parts"), [(32, 4), (12, 3), (10, 2), (7, 1), (3, 1)])
def test_predictions_and_gradients_are_those_of_the_whole_batch(samples, parts, sizes):
    torch.manual_seed(0)
    network, given = Network().double(), asked(samples, sizes=sizes)
    seen = []

    def denoise(x_t, *others):
        seen.append(len(x_t))
        return network(x_t, *others)

    apart = Apart(denoise, Cores(4), list(network.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(apart(*given), network(*given), rtol=0, atol=1e-14)
    assert seen == [samples // parts] * parts and apart.parts(samples) == parts
    whole, found = gradients(network, network, given), gradients(network, apart, given)
    assert found.pop("unused") is whole.pop("unused") is None
    for name, expected in whole.items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


def test_sums_are_in_the_same_order_whichever_core_is_first():
    torch.manual_seed(0)
    network, given = Network(), asked(32, torch.float32)
    apart = Apart(network, Cores(4), list(network.parameters()))
    first = gradients(network, apart, given)
    for _ in range(20):
        again = gradients(network, apart, given)
        assert all(torch.equal(again[name], first[name]) for name in first if first[name] is not None)


def test_a_gradient_that_is_wanted_of_some_weights_alone_goes_to_those():
    network, given = Network().requires_grad_(False), asked(8, torch.float32)
    network.caption.requires_grad_(True)
    apart = Apart(network, Cores(2), list(network.caption.parameters()))
    found = gradients(network, apart, given)
    assert {name for name, grad in found.items() if grad is not None} == {"caption.weight", "caption.bias"}
    with torch.no_grad():
        assert not apart(*given).requires_grad


def test_an_error_in_a_part_is_the_callers():
    def denoise(x_t, *others):
        raise FloatingPointError("a part")

    with pytest.raises(FloatingPointError, match="a part"):
        Apart(denoise, Cores(2), ())(*asked(8))


def test_cores_are_for_small_networks_on_a_cpu_of_several(two_threads):
    small, large = nn.Linear(2, 2), nn.Linear(1, SMALL, device="meta")
    found = cores_for(torch.device("cpu"), small)
    assert found is not None and found.count == 2
    assert cores_for(torch.device("cuda"), small) is None and cores_for(torch.device("cpu"), small, large) is None
    torch.set_num_threads(1)
    assert cores_for(torch.device("cpu"), small) is None


FULL = ["--batch-size", "4", "--accumulation", "2", "--steps", "4"]


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [[], ["--lora"], ["--checkpointing", "on"], ["--method", "dde"], ["--precision", "fp64"]], ids=str
)
def test_a_run_begins_at_exactly_zero(world, tmp_path, two_threads, flags):
    run = make_run(world("sd15"), world("pairs"), tmp_path, *FULL, *flags)
    assert isinstance(run.step.policy, Apart) and run.encoder.cores is run.step.policy.cores
    batches = run.batches()
    terms = run.step(run.encoder.inputs(next(batches)), run.correction())
    batches.close()
    assert not terms.logit.any() and torch.equal(terms.loss, torch.full_like(terms.loss, math.log(2)))
    terms.loss.sum().backward()
    assert run.updater.grad_norm(1.0) > 0


@pytest.mark.long
def test_a_run_is_that_on_one_core_up_to_rounding_and_resumes_exactly(world, tmp_path, two_threads):
    flags = [*FULL, "--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4"]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    advance(run, 2)
    snapshot(run)
    resumed = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags, "--resume", "latest")
    advance(run, 2)
    advance(resumed, 2)
    made, again = everything(run), everything(resumed)
    assert [name for name in made if not torch.equal(made[name], again[name])] == []
    torch.set_num_threads(1)
    alone = make_run(world("sd15"), world("pairs"), tmp_path / "alone", *flags)
    assert not isinstance(alone.step.policy, Apart)
    advance(alone, 4)
    for name, expected in everything(alone).items():
        torch.testing.assert_close(made[name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [["--lora", "--lora-dropout", "0.5"], ["--precision", "bf16"], ["--precision", "bf16-pure"]], ids=str
)
def test_what_is_of_a_whole_batch_or_a_thread_stays_together(world, tmp_path, two_threads, flags):
    run = make_run(world("sd15"), world("pairs"), tmp_path, *FULL, *flags)
    assert not isinstance(run.step.policy, Apart) and run.encoder.cores is None
    figures = advance(run, 1)
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

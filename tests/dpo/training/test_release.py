"""dpo.training.release: the same update made inside backward, what clips it, and what is left out."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dpo.training.checkpoint import pack
from dpo.training.optimizer import Updater, build
from dpo.training.release import Release

KINDS = [
    ("adamw8bit", torch.float32),
    ("adamw8bit", torch.bfloat16),
    ("adamw", torch.float32),
    ("adamw", torch.float64),
]


class Net(torch.nn.Module):
    """A weight that is used twice, a recomputed block, a tensor small enough for moments in fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.block = torch.nn.Linear(72, 72), torch.nn.Sequential(torch.nn.Linear(72, 72), torch.nn.SiLU())
        self.norm = torch.nn.LayerNorm(72)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(torch.tanh(self.shared(x)))
        return self.norm(x + checkpoint(self.block, x, use_reentrant=False))


def make(kind: str, dtype: torch.dtype, *, released: bool, limit: float = 0.0) -> tuple[Net, Updater]:
    net = Net().to(dtype)
    weights = list(net.parameters())
    made = build(kind, weights, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, seed=5)
    release = Release(made, weights, limit) if released else None
    return net, Updater([name for name, _ in net.named_parameters()], weights, made, limit, release=release)


def loss_of(net: Net, step: int) -> torch.Tensor:
    weight = net.norm.weight
    x = torch.randn(8, 72, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
    return (net(x) - x.roll(1, 1)).square().mean()


def update(net: Net, updater: Updater, step: int, share: float = 1.0, scale: float = 1.0) -> torch.Tensor:
    """One update; the norm that it reports."""
    rate = 1e-3 * (step + 1)
    updater.backward(scale * loss_of(net, step), rate, share)
    norm = updater.grad_norm(share)
    updater.update(rate, norm, step)
    return norm


def state(updater: Updater) -> list[torch.Tensor]:
    """Copies of the weights and of the optimizer's state."""
    found = [p.detach().clone() for p in updater.parameters]
    saved, _ = pack(updater.optimizer.state_dict())
    return found + [saved[name].clone() for name in sorted(saved)]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_without_clipping_it_is_the_ordinary_update_bit_for_bit(kind, dtype):
    """Moments, counts of updates and stochastic rounding too; with holes (a share below 1) as without."""
    pairs = [make(kind, dtype, released=released) for released in (False, True)]
    for step, share in enumerate((1.0, 0.75, 1.0, 0.3)):
        norms = [update(net, updater, step, share) for net, updater in pairs]
        assert torch.equal(*norms) and norms[0] > 0
    ordinary, released = (state(updater) for _, updater in pairs)
    assert equal(ordinary, released)
    assert not torch.equal(ordinary[0], Net().shared.weight.to(dtype))


def test_no_two_gradients_are_in_memory_together():
    net, updater = make("adamw8bit", torch.bfloat16, released=True)
    seen, step_one = [], updater.optimizer.step_one

    def watched(key, **scalars):
        seen.append((key, [i for i, p in enumerate(updater.parameters) if p.grad is not None]))
        step_one(key, **scalars)

    updater.optimizer.step_one = watched
    update(net, updater, 0)
    assert sorted(key for key, _ in seen) == list(range(6)) and all(alone == [key] for key, alone in seen)
    assert all(p.grad is None for p in updater.parameters)


@pytest.mark.parametrize("kind", ["adamw8bit", "adamw"])
def test_gradients_are_clipped_by_the_norm_of_the_update_before(kind):
    """The first is not clipped; then each is what the ordinary update makes of gradients times that factor."""
    limit = 0.05
    net, updater = make(kind, torch.float32, released=True, limit=limit)
    other, plain = make(kind, torch.float32, released=False)
    before, factors = None, []
    for step in range(4):
        factor = 1.0 if before is None else min(1.0, limit / (before + 1e-6))
        factors.append(factor)
        before = update(net, updater, step, scale=4.0 if step == 1 else 1.0).item()
        plain.backward(loss_of(other, step) * (4.0 if step == 1 else 1.0))
        for p in plain.parameters:
            p.grad *= factor
        plain.update(1e-3 * (step + 1), plain.grad_norm(1.0), step)
    assert factors[0] == 1.0 and max(factors[1:]) < 0.5 and len(set(factors)) == 4
    for a, b in zip(updater.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("kind", "dtype"), KINDS[:3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(kind, dtype, bad):
    net, updater = make(kind, dtype, released=True, limit=1.0)
    update(net, updater, 0)
    start, norm = state(updater), updater.release.before.clone()
    assert not update(net, updater, 1, scale=bad).isfinite()
    assert equal(state(updater), start) and torch.equal(updater.release.before, norm)


@pytest.mark.parametrize(("kind", "dtype"), KINDS[:3])
def test_a_gradient_that_is_not_finite_leaves_its_own_weights_alone(kind, dtype):
    net, updater = make(kind, dtype, released=True, limit=1.0)
    update(net, updater, 0)
    start = [p.detach().clone() for p in updater.parameters]
    broken = net.block[0].weight.register_hook(
        lambda grad: grad.clone().index_fill_(0, torch.tensor([3]), float("inf"))
    )
    norm = update(net, updater, 1)
    kept = [name for name, p, old in zip(updater.names, updater.parameters, start, strict=True) if torch.equal(p, old)]
    assert kept == ["block.0.weight"] and updater.release.skipped() == 1
    assert not norm.isfinite() and updater.release.before.isfinite() and updater.release.before > 0
    broken.remove()
    update(net, updater, 2)
    assert not torch.equal(net.block[0].weight, start[2]) and all(p.isfinite().all() for p in updater.parameters)


def test_without_a_usable_pair_nothing_changes():
    """Adam would move the weights by what it remembers."""
    net, updater = make("adamw8bit", torch.float32, released=True)
    update(net, updater, 0)
    start = state(updater)
    assert update(net, updater, 1, share=0.0) == 0.0 and equal(state(updater), start)


def test_averaged_weights_follow():
    averages = []
    for released in (False, True):
        net, made = make("adamw", torch.float32, released=released)
        updater = Updater(made.names, made.parameters, made.optimizer, 0.0, None, 0.5, release=made.release)
        for step in range(3):
            update(net, updater, step)
        averages.append(updater.ema)
    assert equal(*averages) and not torch.equal(averages[0][0], made.parameters[0])

"""csrc_triton.op: the short way has the registered operation's results, and is taken by eager calls on plain tensors alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from csrc_triton.op import Op, op
from tests.help.operations import Operations


@op("test_scaled")
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@scaled.register_fake
def _(x, factor):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    _, ctx.factor = inputs


def _backward(ctx, grad):
    return grad * ctx.factor, None


scaled.register_autograd(_backward, setup_context=_setup)


@op("test_fixed")
def fixed(x: torch.Tensor) -> torch.Tensor:
    """Has no gradient."""
    return x + 1


@fixed.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.fixture
def registered(monkeypatch):
    """The names of the operations that went through torch's dispatcher."""
    seen = []
    for each in (scaled, fixed):
        own = each.registered
        monkeypatch.setattr(each, "registered", lambda *args, own=own: seen.append(own._name) or own(*args))
    return seen


def test_both_ways_give_the_same(registered):
    x = torch.randn(3, 4, requires_grad=True)
    results = []
    for way in (scaled, scaled.registered):
        y = way(x, 3.0)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and len(registered) == 1
    assert torch.equal(scaled(x.detach(), 3.0), x.detach() * 3.0) and torch.equal(fixed(x.detach()), x.detach() + 1)
    with torch.no_grad():
        assert not scaled(x, 2.0).requires_grad
    assert len(registered) == 1
    assert torch.equal(checkpoint(scaled, x, 2.0, use_reentrant=False), x * 2.0) and len(registered) == 1


def test_whatever_watches_operations_sees_them(registered):
    x = torch.randn(2, requires_grad=True)
    with Operations() as counted:
        scaled(x, 2.0).sum().backward()
    assert counted.found["csrc_triton.test_scaled.default"] == 1
    with FakeTensorMode() as mode:
        assert scaled(mode.from_tensor(x), 2.0).shape == (2,)
    fake = mode.from_tensor(x)
    scaled(fake, 2.0)  # a subclass, outside of its mode too
    assert len(registered) == 3
    traced = torch.compile(lambda y: scaled(y, 2.0) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x), x * 2.0 + 1)


def test_a_gradient_that_does_not_exist_is_no_silent_nothing(registered):
    x = torch.randn(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="test_fixed"):
        fixed(x).sum().backward()


def test_every_op_of_the_package_is_one():
    from csrc_triton import geglu, group_norm_silu, layer_norm, noising, pair_errors

    for module in (geglu, group_norm_silu, layer_norm, noising, pair_errors):
        assert [value for value in vars(module).values() if isinstance(value, Op)]
        assert not [value for value in vars(module).values() if isinstance(value, torch.library.CustomOpDef)]


@pytest.mark.parametrize("differentiated", [False, True])
def test_what_a_forward_is_made_of_goes_past_autograd(differentiated):
    """Its operations cost the host less so, and the result can be differentiated, changed and viewed as any other."""
    seen, leaf = [], torch.ones(1, requires_grad=True)

    def is_recorded() -> bool:
        with torch.enable_grad():
            return (leaf * 2.0).requires_grad

    @op(f"test_inside_{differentiated}")
    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_recorded())
        return x * 2.0

    inside.register_autograd(lambda ctx, grad: grad * 2.0, setup_context=lambda ctx, inputs, output: None)
    x = torch.ones(4, requires_grad=differentiated)
    y = inside(x)
    assert seen == [False] and is_recorded() and y.requires_grad == differentiated
    z = y * 1.0 if differentiated else y
    z.view(2, 2).add_(1.0)  # of a result without a gradient, in place
    assert z.tolist() == [3.0] * 4 and (z.sum().backward() is None if differentiated else z._version == 1)
    assert not differentiated or x.grad.tolist() == [2.0] * 4

"""The count of live bytes and FLOPs, on real and on fake tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dpo.training.memory import ATTENTION, HOST, RECOMPUTE, Lifetimes, blocked

SIDE = 64
SQUARE = SIDE * SIDE * 4  # bytes


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode], ids=["real", "fake"])
def test_bytes_live_as_long_as_their_storages(mode):
    with mode(), Lifetimes() as memory:
        x = torch.empty(SIDE, SIDE)
        y = x + 1
        view = y.t()
        del y
        assert memory.live["other"] == 2 * SQUARE
        del view
        z = x * 2
        z.add_(1)
        assert memory.live["other"] == 2 * SQUARE and memory.peak == 2 * SQUARE
        del x, z
    assert memory.live["other"] == 0 and memory.peak == 2 * SQUARE


def test_the_peak_says_what_was_live_at_it():
    with Lifetimes() as memory:
        weight = torch.empty(SIDE, SIDE)
        memory.hold("weights", [weight])
        with memory.within("work"):
            weight + 1  # let go at once
            pair = weight @ weight, weight * 2
        del pair
        away = torch.empty(SIDE, SIDE)
        memory.hold(HOST, [away])
        away.add_(1)
    assert memory.at_peak == {"weights": SQUARE, "work": 2 * SQUARE}
    assert memory.live["other"] == 0 and memory.live[HOST] == 0


def test_storages_are_rounded_up_to_blocks():
    with Lifetimes(block=512) as memory:
        kept = torch.empty(1), torch.empty(129)
    assert memory.peak == 512 + 1024 and len(kept) == 2


def test_of_a_kind_that_is_cut_a_share_counts():
    with Lifetimes(shares={"weights": 0.25}) as memory:
        weight, other = torch.empty(SIDE, SIDE), torch.empty(SIDE, SIDE)
        memory.hold("weights", [weight])
        assert memory.live == {"weights": SQUARE // 4, "other": SQUARE} and other.numel()
        del weight
    assert memory.live["weights"] == 0 and memory.peak == 2 * SQUARE


def test_counting_begins_anew():
    with Lifetimes() as memory:
        x = torch.empty(SIDE, SIDE)
        x @ x
        memory.begin()
    assert memory.peak == SQUARE and not memory.flops


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_flops_are_those_of_torchs_counter_by_phase(again):
    layers = nn.Sequential(nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, SIDE))
    x = torch.ones(2, SIDE, requires_grad=True)

    def work(memory: Lifetimes) -> None:
        with memory.within("forward"):
            y = checkpoint(layers, x, use_reentrant=False) if again else layers(x)
        with memory.within("backward"):
            y.sum().backward()

    with Lifetimes() as memory:
        work(memory)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        work(Lifetimes())
    assert sum(memory.flops.values()) == counter.get_total_flops()
    one = 2 * 2 * SIDE * SIDE
    assert memory.flops["forward"] == 2 * one and memory.flops["backward"] == 4 * one
    assert (memory.flops[RECOMPUTE] > 0) == again


def test_a_number_without_a_value_is_told_by_phase():
    with FakeTensorMode(), Lifetimes(numbers={"other": 1.0}) as memory:
        assert int(torch.ones(3).sum()) == 1
        with memory.within("update"):
            assert torch.ones(()).item() == 0.0


def test_attention_on_a_cpu_is_counted_as_on_a_gpu():
    """2 products of S x S x D forward, 5 backward, which makes the first one again."""
    q, k, v = (torch.ones(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    with Lifetimes() as memory:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        with memory.within("backward"):
            out.sum().backward()
    product = 2 * 2 * 8 * 8 * 16
    assert memory.flops == {"other": 2 * product, "backward": 5 * product}


def test_what_a_convolution_takes_inside_is_counted():
    """[2, 3, 8, 8] read, [2, 5, 8, 8] made; backward reads both and makes the gradient of the first and of the weights."""
    x, made = 4 * 2 * 3 * 64, 4 * 2 * 5 * 64
    weight = torch.zeros(5, 3, 1, 1, requires_grad=True)
    for inside, forward, back in ((None, 0, 0), (blocked, x, made + x)):
        with Lifetimes(inside=inside) as memory:
            pixels = torch.zeros(2, 3, 8, 8).requires_grad_()
            output = torch.nn.functional.conv2d(pixels, weight)
            assert memory.peak == x + made + forward
            with torch.no_grad():
                grad = torch.zeros_like(output)
            output.backward(grad)
        assert memory.peak == 2 * x + 2 * made + 4 * 15 + back, inside

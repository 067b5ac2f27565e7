"""CUDA's rules on the CPU's fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpo.planning.cuda import CARDS, GIB, autocast_of_cuda, recompute_as_cuda, room, unseen


def norms(x: torch.Tensor) -> list[torch.dtype]:
    weight = torch.ones(4, dtype=x.dtype)
    return [F.group_norm(x, 2, weight, weight).dtype, F.layer_norm(x, (4,), weight, weight).dtype, x.softmax(-1).dtype]


def test_norms_and_softmax_run_in_fp32_under_cudas_autocast():
    x = torch.ones(2, 4, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast_of_cuda():
        assert norms(x) == [torch.float32] * 3
        assert (x @ x).dtype == torch.bfloat16
    with autocast_of_cuda():
        assert norms(x) == [torch.bfloat16] * 3


def test_gradients_come_back_in_half_precision():
    x = torch.ones(2, 4, requires_grad=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast_of_cuda():
        x.softmax(-1).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_what_the_backward_pass_computes_again_is_computed_alike():
    x = torch.ones(2, 4, requires_grad=True, dtype=torch.bfloat16)
    block = nn.Module()
    block._gradient_checkpointing_func = None
    recompute_as_cuda(block)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast_of_cuda():
        block._gradient_checkpointing_func(lambda x: F.layer_norm(x, (4,)) ** 2, x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("card", CARDS)
def test_a_card_has_less_than_it_is_sold_with(card):
    assert 0.8 * card * GIB < room(card) < card * GIB
    assert room(card) == room(float(card)) and room(100) == pytest.approx(93 * GIB)


def test_what_no_tensor_shows_is_said_to_be_estimated():
    assert all("estimate" in name for name in unseen(GIB))
    assert sum(unseen(10 * GIB).values()) > sum(unseen(GIB).values())

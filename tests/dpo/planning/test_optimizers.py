"""States of bitsandbytes' optimizers: made once, of the sizes that it gives them."""

import pytest
import torch

from dpo.planning.optimizers import MOMENTS, StatesOnly


@pytest.mark.parametrize("kind", MOMENTS)
def test_states_have_the_sizes_of_bitsandbytes(kind):
    large, small = torch.nn.Parameter(torch.zeros(4096 + 1)), torch.nn.Parameter(torch.zeros(10))
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer = StatesOnly([large, small], kind)
    optimizer.step()
    made = [id(tensor) for tensor in optimizer.tensors()]
    optimizer.step()
    assert [id(tensor) for tensor in optimizer.tensors()] == made
    assert sum(t.nbytes for t in optimizer.tensors()) == MOMENTS[kind] * (4097 + 4 * 17 + 4 * 10)
    assert not large.any()

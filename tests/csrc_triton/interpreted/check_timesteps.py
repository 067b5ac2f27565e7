"""The kernel that draws timesteps, in the interpreter: the bits of plain torch, for any number of pairs and of values."""

import pytest
import torch

from csrc_triton.timesteps import _launch, draw_timesteps_reference


@pytest.mark.parametrize(
    ("pairs", "values"),
    [(1, [7]), (3, [999, 749, 499, 249]), (129, range(1000)), (300, range(200, 700)), (2, range(50_000))],
)
def test_bits_of_plain_torch(pairs, values):
    generator = torch.Generator().manual_seed(pairs)
    keys = torch.randint(-(2**62), 2**62, (pairs,), generator=generator)
    draws = torch.randint(0, 2**31, (pairs,), generator=generator)
    for seed in (0, 2**32 - 1):
        arguments = (torch.tensor(list(values)), keys, draws, torch.tensor(seed))
        found = _launch(*arguments)
        assert found.dtype == torch.int64 and torch.equal(found, draw_timesteps_reference(*arguments))
    strided = (arguments[0], keys.repeat_interleave(2)[::2], draws.repeat_interleave(2)[::2], arguments[3])
    assert torch.equal(_launch(*strided), found)

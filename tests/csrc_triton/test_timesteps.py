"""Drawn timesteps on the CPU: keyed, from the list alone, all as likely; fake and compiled; refusals."""

import pytest
import torch

from csrc_triton.philox import Stream, integers
from csrc_triton.timesteps import draw_timesteps

KEYS, DRAWS = torch.arange(40_000) * 7919 - 2**40, torch.arange(40_000) % 3


def test_the_values_of_the_list_are_drawn_as_integers_are():
    values = torch.arange(200, 700)
    found = draw_timesteps(values, KEYS, DRAWS, 5)
    assert torch.equal(found, integers(KEYS, DRAWS, Stream.TIMESTEP, 5, 200, 700))
    counts = torch.bincount(found, minlength=700)[200:].double()
    assert abs(((counts - 80).square() / 80).sum().item() - 499) < 5 * (2 * 499) ** 0.5
    few = torch.tensor([999, 749, 499, 249])
    assert set(draw_timesteps(few, KEYS[:200], DRAWS[:200], 5).tolist()) == set(few.tolist())
    assert torch.equal(draw_timesteps(few, KEYS[7:9], DRAWS[7:9], 5), draw_timesteps(few, KEYS[:9], DRAWS[:9], 5)[7:])


def test_opcheck_and_compilation():
    arguments = (torch.arange(50), KEYS[:5], DRAWS[:5], torch.tensor(3))
    torch.library.opcheck(torch.ops.csrc_triton.draw_timesteps, arguments)
    compiled = torch.compile(draw_timesteps, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), draw_timesteps(*arguments))


@pytest.mark.parametrize(
    ("values", "keys", "words"),
    [
        (torch.arange(0), KEYS[:2], "values"),
        (torch.ones(3), KEYS[:2], "values"),
        (torch.arange(3), KEYS[:2].int(), "keys"),
    ],
)
def test_other_arguments_are_refused(values, keys, words):
    with pytest.raises(AssertionError, match=words):
        draw_timesteps(values, keys, DRAWS[:2], 0)

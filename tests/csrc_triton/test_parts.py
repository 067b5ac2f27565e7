"""AdamW8bit on shards: the bits of every update and of the state are those of the whole tensors."""

import pytest
import torch

from csrc_triton.adamw8bit import AdamW8bit
from csrc_triton.parts import Part, chunks_of

SIZES = ((16, 512), (9, 40), (3,), (2, 9, 256), (64, 64))  # the last but one in one block a row; some shards are empty


def cut(values, shards, rank):
    """The shards of `rank` as FSDP2 cuts them, by rows, and what they are parts of."""
    parts, own = [], []
    for value in values:
        rows = torch.chunk(value, shards)
        each = value.numel() // len(value)
        counts = tuple(len(rows[r]) * each if r < len(rows) else 0 for r in range(shards))
        parts.append(Part(counts, rank, 0))
        own.append(rows[rank].clone() if rank < len(rows) else value.new_empty((0, *value.shape[1:])))
    return own, parts


def optimizers(shards, dtype):
    """One optimizer on whole tensors, and one for each shard."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    whole = AdamW8bit([torch.nn.Parameter(v.clone()) for v in values], lr=1e-2, seed=3)
    split = []
    for rank in range(shards):
        own, parts = cut(values, shards, rank)
        split.append(AdamW8bit([torch.nn.Parameter(v) for v in own], lr=1e-2, seed=3, parts=parts))
    return whole, split


def weights(optimizer):
    return optimizer.param_groups[0]["params"]


def step(whole, split, seed):
    generator = torch.Generator().manual_seed(seed)
    for index, p in enumerate(weights(whole)):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        for rank, one in enumerate(split):
            (weights(one)[index].grad,), _ = cut([p.grad], len(split), rank)
    for one in (whole, *split):
        one.step(clip=torch.tensor([0.7]))


def gathered(split):
    """What `whole_state` gives when every shard takes part: the parts are heard first, then put together."""
    heard = []
    for one in split:
        heard.append([])
        assert one.whole_state(lambda own, counts: heard[-1].append(own.clone())) is None
    calls = iter(zip(*heard, strict=True))

    def gather(own, counts):
        found = next(calls)
        assert [len(x) for x in found] == counts
        return torch.cat(found)

    return split[0].whole_state(gather)


def same(a, b):
    assert a["format"] == b["format"] and a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for name, value in a["state"].items():
        assert torch.equal(value, b["state"][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [2, 4])
def test_the_bits_are_those_of_the_whole(shards, dtype):
    whole, split = optimizers(shards, dtype)
    for seed in range(3):
        step(whole, split, seed)
    for index, p in enumerate(weights(whole)):
        assert torch.equal(p, torch.cat([weights(one)[index] for one in split])), SIZES[index]
    same(whole.state_dict(), gathered(split))


def test_a_state_goes_from_any_number_of_shards_to_any_other():
    whole, split = optimizers(2, torch.bfloat16)
    step(whole, split, 0)
    state = gathered(split)
    _, four = optimizers(4, torch.bfloat16)
    for one in four:
        one.load_state_dict(state)
    same(gathered(four), whole.state_dict())


def test_the_whole_tensor_decides_on_8_bits():
    whole, split = optimizers(2, torch.float32)
    blocks = [len(one.state_tensors()["m_max"]) for one in split]
    assert sum(blocks) == len(whole.state_tensors()["m_max"]) == (16 * 512 + 2 * 9 * 256 + 64 * 64) // 256


def test_a_shard_that_cuts_a_block_is_refused():
    assert Part((4000, 4000), 0, 0).cuts_a_block() and not Part((512, 4001), 0, 0).cuts_a_block()
    assert not Part((100, 100), 0, 0).cuts_a_block() and not Part((5000, 0), 1, 0).cuts_a_block()
    with pytest.raises(AssertionError, match="cuts a block"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4000))], parts=[Part((4000, 4000), 0, 0)])


def test_every_chunk_of_every_parameter_is_worked_on_once():
    rows, counts = [3, 0, 7], [2, 1, 4]
    wanted = [(row, chunk) for row, count in zip(rows, counts, strict=True) for chunk in range(count)]
    found = chunks_of(rows, counts)
    assert found.dtype == torch.int32 and [tuple(pair) for pair in found.tolist()] == wanted
    assert chunks_of([4, 2], [0, 0]).shape == (0, 2), "of empty shards nothing is launched"

"""dpo.models.dropout: masks are keyed, shared by both images of a pair, off without a gradient, kept when recomputed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from csrc_triton.philox import Stream, random_bits
from dpo.models.dropout import KeyedDropout, Masks, kept

KEYS, DRAWS, SEED = torch.tensor([11, -5, 2**61]), torch.tensor([0, 0, 4]), torch.tensor(3)


def dropout(rate: float = 0.3, layer: int = 2, keys: torch.Tensor = KEYS, draws: torch.Tensor = DRAWS) -> KeyedDropout:
    masks = Masks()
    masks.set(keys, draws, SEED)
    return KeyedDropout(rate, layer, masks)


def test_a_mask_is_a_function_of_seed_pair_draw_layer_and_element():
    mask = kept(KEYS, DRAWS, SEED, 2, 0.3, 1001)
    assert torch.equal(mask, random_bits(KEYS, DRAWS, 11 + 256 * 2, 3, 1001) >= 0.3 * 2**32)
    for i in range(3):  # whatever pairs it is drawn beside
        assert torch.equal(kept(KEYS[i : i + 1], DRAWS[i : i + 1], SEED, 2, 0.3, 1001)[0], mask[i])
    assert torch.equal(kept(KEYS, DRAWS, SEED, 2, 0.3, 500), mask[:, :500])
    others = [
        kept(KEYS + 1, DRAWS, SEED, 2, 0.3, 1001),
        kept(KEYS, DRAWS + 1, SEED, 2, 0.3, 1001),
        kept(KEYS, DRAWS, SEED + 1, 2, 0.3, 1001),
        kept(KEYS, DRAWS, SEED, 3, 0.3, 1001),
    ]
    for other in others:  # independent: they agree as often as chance has it, 0.3^2 + 0.7^2
        assert 0.54 < (other == mask).float().mean() < 0.62
    assert 0.68 < mask.float().mean() < 0.72
    assert int(Stream.ADAPTER) < 256 and max(Stream) < 256, "the low byte of the stream word is the stream's"


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_images_of_a_pair_share_their_mask(shape, dtype):
    x = torch.randn(6, *shape, dtype=torch.float64).to(dtype).requires_grad_()
    y = dropout()(x)
    assert y.shape == x.shape and y.dtype == dtype
    mask = kept(KEYS, DRAWS, SEED, 2, 0.3, x[0].numel()).view(3, *shape).repeat(2, *[1] * len(shape))
    torch.testing.assert_close(y, torch.where(mask, x / 0.7, 0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, mask.to(dtype) / 0.7)
    assert torch.equal(dropout()(x[:3]), y[:3]), "preferred images alone, as in sft"


def test_memory_layout_does_not_matter():
    x = torch.randn(6, 4, 5, 3)
    assert torch.equal(dropout()(x.to(memory_format=torch.channels_last)), dropout()(x))


def test_only_a_pass_with_a_gradient_is_masked():
    x, module = torch.randn(6, 40), dropout(rate=0.5)
    state = torch.random.get_rng_state()
    assert not torch.equal(module.eval()(x), x) and torch.equal(module(x), module.train()(x))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(module(x), x)
    assert torch.equal(torch.random.get_rng_state(), state), "no global generator is consumed"


def test_a_recomputed_pass_meets_the_same_masks():
    def gradient(through):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), dropout(rate=0.5), nn.Linear(8, 8))
        x = torch.randn(6, 8).requires_grad_()
        through(net, x).square().sum().backward()
        return x.grad

    plain = gradient(lambda net, x: net(x))
    assert torch.equal(gradient(lambda net, x: checkpoint(net, x, use_reentrant=False)), plain)


@pytest.mark.long
def test_compiles_into_one_graph_that_reads_the_pairs_of_each_step():
    module = dropout()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 24, requires_grad=True)
    for step in range(3):
        module.masks.set(KEYS + step, DRAWS, SEED)
        assert torch.equal(compiled(x), module(x)), step
    with torch.no_grad():
        assert torch.equal(compiled(x), x)

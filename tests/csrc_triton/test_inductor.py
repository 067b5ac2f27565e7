"""Every differentiable op in one function, compiled by the default backend without a graph break: same value, same
gradients.
"""

import pytest
import torch

from csrc_triton.geglu import geglu
from csrc_triton.group_norm_silu import group_norm_silu
from csrc_triton.layer_norm import add_layer_norm
from csrc_triton.noising import noise_pairs
from csrc_triton.pair_errors import pair_errors
from dpo.objective import pair_loss


def everything(projection, image, weight, bias, policy, reference, latents, timesteps, signal, keys, draws, seed):
    gated = geglu(projection)
    total, normed = add_layer_norm(gated, 2 * gated, torch.ones_like(gated[0]), torch.zeros_like(gated[0]), 1e-5)
    x_t = noise_pairs(latents, timesteps, signal, signal, keys, draws, seed, out_dtype=torch.float32)
    ones = torch.ones_like(signal)
    found = pair_errors(
        1.5 * policy + x_t, timesteps, ones[:2], ones[:2], ones, 0 * signal, torch.tensor(5.0),
        reference=reference + x_t, noise=(keys, draws, seed),
    )  # fmt: skip
    terms = pair_loss(found, ones[:2], ones[:2], timesteps, shape="sigmoid", sft_weight=0.1)
    images = group_norm_silu(image, weight, bias, 4, 1e-5).square().sum()
    return terms.loss.sum() + normed.sum() + total.square().mean() + images


@pytest.mark.slow
def test_one_function_of_all_ops_compiles_whole():
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 16), (2, 8, 3, 5), (8,), (8,), (4, 4, 3, 5), (4, 4, 3, 5), (4, 4, 3, 5)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    trained = [tensor.requires_grad_() for tensor in tensors[:5]]
    rest = (
        torch.tensor([1, 5]),
        torch.linspace(0.99, 0.1, 10),
        torch.tensor([1, 2]),
        torch.tensor([0, 1]),
        torch.tensor(3),
    )
    expected = everything(*tensors, *rest)
    actual = torch.compile(everything, fullgraph=True)(*tensors, *rest)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad(actual, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs)

"""Noising on the CPU implementation against the equations in float64; the op contract. The kernels: check_noising.py."""

import pytest
import torch

from csrc_triton.noising import (
    noise_and_target,
    noise_and_target_reference,
    noise_pairs,
    noise_pairs_reference,
    pair_noise,
    sample_posterior,
    sample_posterior_reference,
)
from csrc_triton.philox import Stream, normal

B, SHAPE = 3, (4, 5, 7)
KEYS, DRAWS, SEED = torch.tensor([3, -9, 2**60]), torch.tensor([0, 5, 1]), torch.tensor(17)
TIMESTEPS = torch.tensor([0, 500, 999])
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def latents(dtype=torch.float32):
    return torch.randn(2 * B, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_equations_in_float64():
    x, noise = latents(torch.float64), pair_noise(KEYS, DRAWS, SEED, SHAPE, torch.float64).repeat(2, 1, 1, 1)
    signal, spread = (a[TIMESTEPS].repeat(2).view(-1, 1, 1, 1) for a in (ALPHAS.sqrt(), (1 - ALPHAS).sqrt()))
    noisy, epsilon = noise_and_target(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, prediction_type="epsilon")
    torch.testing.assert_close(noisy, signal * x + spread * noise, rtol=1e-14, atol=1e-14)
    assert torch.equal(epsilon, noise)
    again, v = noise_and_target(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, prediction_type="v_prediction")
    torch.testing.assert_close(v, signal * noise - spread * x, rtol=1e-14, atol=1e-14)
    assert torch.equal(again, noisy) and torch.equal(noise_pairs(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED), noisy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_and_dtypes(dtype, no_worse):
    x = latents(dtype)
    exact = noise_pairs(x.double(), TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    noisy, target = noise_and_target(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, prediction_type="epsilon")
    no_worse(noisy, exact.to(dtype), exact)
    assert target.dtype == torch.float32
    wide = noise_pairs(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, out_dtype=torch.float32)
    assert torch.equal(wide.to(dtype), noisy) and (wide - exact).abs().max() < 1e-6


def test_small_timesteps_keep_the_precision_of_the_table():
    """1 - abar is formed in the table's dtype: with a float64 table nothing cancels at t = 0."""
    zeros = torch.zeros(2 * B, *SHAPE)
    noisy = noise_pairs(zeros, torch.zeros(B, dtype=torch.int64), ALPHAS, KEYS, DRAWS, SEED)
    exact = (1 - ALPHAS[0]).sqrt() * pair_noise(KEYS, DRAWS, SEED, SHAPE, torch.float64).repeat(2, 1, 1, 1)
    torch.testing.assert_close(noisy.double(), exact, rtol=1e-6, atol=1e-8)


def test_halves_share_the_noise_and_layout_is_kept():
    x = latents()
    noisy = noise_pairs(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    same = noise_pairs(torch.cat([x[:B], x[:B]]), TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    assert torch.equal(same[:B], same[B:]) and torch.equal(same[:B], noisy[:B])
    last = noise_pairs(x.to(memory_format=torch.channels_last), TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    assert torch.equal(last, noisy) and last.is_contiguous(memory_format=torch.channels_last)
    odd = noise_pairs(x.transpose(2, 3).contiguous().transpose(2, 3), TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    assert torch.equal(odd, noisy) and odd.is_contiguous()


def test_permutation_of_pairs():
    x, order = latents(), torch.tensor([2, 0, 1])
    both = torch.cat([order, order + B])
    noisy = noise_pairs(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    permuted = noise_pairs(x[both], TIMESTEPS[order], ALPHAS, KEYS[order], DRAWS[order], SEED)
    assert torch.equal(permuted, noisy[both])


def test_posterior_sample():
    mean, std = latents(torch.float64), latents(torch.float64).abs()
    z = sample_posterior(mean, std, KEYS, DRAWS, SEED, 0.18215, 0.5)
    noise = torch.cat([normal(KEYS, DRAWS, s, SEED, SHAPE, torch.float64) for s in (Stream.VAE_WIN, Stream.VAE_LOSE)])
    torch.testing.assert_close(z, (mean + std * noise - 0.5) * 0.18215, rtol=1e-14, atol=1e-14)
    narrow = sample_posterior(mean.bfloat16(), std.bfloat16(), KEYS, DRAWS, SEED, 0.18215)
    assert narrow.dtype == torch.bfloat16 and not torch.equal(noise[:B], noise[B:])
    assert torch.equal(sample_posterior(mean, std * 0, KEYS, DRAWS, SEED, 1.0), mean)


CALLS = {
    "noise_pairs": (torch.ops.csrc_triton.noise_pairs, lambda x: (x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, torch.bfloat16)),
    "noise_and_target": (
        torch.ops.csrc_triton.noise_and_target,
        lambda x: (x, TIMESTEPS, ALPHAS.float(), KEYS, DRAWS, SEED, "v_prediction", torch.float32),
    ),
    "sample_posterior": (torch.ops.csrc_triton.sample_posterior, lambda x: (x, x.abs(), KEYS, DRAWS, SEED, 0.13, 0.0)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(name, memory_format):
    op, arguments = CALLS[name]
    torch.library.opcheck(op, arguments(latents().to(memory_format=memory_format)))


def test_compiles_into_one_graph():
    def function(mean, std):
        x = sample_posterior(mean, std, KEYS, DRAWS, SEED, 0.18)
        noisy, target = noise_and_target(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, prediction_type="v_prediction")
        return noise_pairs(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED) + noisy, target

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = latents()
    for actual, expected in zip(compiled(x, x.abs()), function(x, x.abs())):
        assert torch.equal(actual, expected)


def test_references_are_the_ops_on_the_cpu():
    x = latents()
    arguments = (x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    assert torch.equal(noise_pairs(*arguments), noise_pairs_reference(*arguments))
    ours, plain = (f(*arguments, prediction_type="v_prediction") for f in (noise_and_target, noise_and_target_reference))
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    arguments = (x, x.abs(), KEYS, DRAWS, SEED, 0.18)
    assert torch.equal(sample_posterior(*arguments), sample_posterior_reference(*arguments))


def test_refusals():
    x = latents()
    with pytest.raises(AssertionError, match=r"latents must be \[2B, C, H, W\]"):
        noise_pairs(x[:5], TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED)
    with pytest.raises(AssertionError, match="timesteps must be int64"):
        noise_pairs(x, TIMESTEPS.int(), ALPHAS, KEYS, DRAWS, SEED)
    with pytest.raises(AssertionError, match="prediction_type 'sample'"):
        noise_and_target(x, TIMESTEPS, ALPHAS, KEYS, DRAWS, SEED, prediction_type="sample")
    with pytest.raises(AssertionError, match="std"):
        sample_posterior(x, x[:2], KEYS, DRAWS, SEED, 1.0)

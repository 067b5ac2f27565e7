"""Noising on the CPU implementation against the equations in float64; the op contract. The kernels: check_noising.py."""

import pytest
import torch

from csrc_triton.noising import (
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
PATH = (ALPHAS.sqrt(), (1 - ALPHAS).sqrt())  # signal, spread


def latents(dtype=torch.float32):
    return torch.randn(2 * B, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_equations_in_float64():
    x, noise = latents(torch.float64), pair_noise(KEYS, DRAWS, SEED, SHAPE, torch.float64).repeat(2, 1, 1, 1)
    signal, spread = (a[TIMESTEPS].repeat(2).view(-1, 1, 1, 1) for a in (ALPHAS.sqrt(), (1 - ALPHAS).sqrt()))
    noisy = noise_pairs(x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    torch.testing.assert_close(noisy, signal * x + spread * noise, rtol=1e-14, atol=1e-14)


def test_rectified_flow_is_another_pair_of_tables():
    """x_s = (1 - s) x_0 + s eps."""
    x, noise = latents(torch.float64), pair_noise(KEYS, DRAWS, SEED, SHAPE, torch.float64).repeat(2, 1, 1, 1)
    s = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    level = s[TIMESTEPS].repeat(2).view(-1, 1, 1, 1)
    noisy = noise_pairs(x, TIMESTEPS, 1 - s, s, KEYS, DRAWS, SEED)
    torch.testing.assert_close(noisy, (1 - level) * x + level * noise, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_and_dtypes(dtype, no_worse):
    x = latents(dtype)
    exact = noise_pairs(x.double(), TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    noisy = noise_pairs(x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    no_worse(noisy, exact.to(dtype), exact)
    wide = noise_pairs(x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED, out_dtype=torch.float32)
    assert torch.equal(wide.to(dtype), noisy) and (wide - exact).abs().max() < 1e-6


def test_small_timesteps_keep_the_precision_of_the_table():
    """Where 1 - abar was formed in float64 nothing cancels at t = 0."""
    zeros = torch.zeros(2 * B, *SHAPE)
    noisy = noise_pairs(zeros, torch.zeros(B, dtype=torch.int64), *PATH, KEYS, DRAWS, SEED)
    exact = (1 - ALPHAS[0]).sqrt() * pair_noise(KEYS, DRAWS, SEED, SHAPE, torch.float64).repeat(2, 1, 1, 1)
    torch.testing.assert_close(noisy.double(), exact, rtol=1e-6, atol=1e-8)


def test_halves_share_the_noise_and_layout_is_kept():
    x = latents()
    noisy = noise_pairs(x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    same = noise_pairs(torch.cat([x[:B], x[:B]]), TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    assert torch.equal(same[:B], same[B:]) and torch.equal(same[:B], noisy[:B])
    last = noise_pairs(x.to(memory_format=torch.channels_last), TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    assert torch.equal(last, noisy) and last.is_contiguous(memory_format=torch.channels_last)
    odd = noise_pairs(x.transpose(2, 3).contiguous().transpose(2, 3), TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    assert torch.equal(odd, noisy) and odd.is_contiguous()


def test_permutation_of_pairs():
    x, order = latents(), torch.tensor([2, 0, 1])
    both = torch.cat([order, order + B])
    noisy = noise_pairs(x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    permuted = noise_pairs(x[both], TIMESTEPS[order], *PATH, KEYS[order], DRAWS[order], SEED)
    assert torch.equal(permuted, noisy[both])


def test_posterior_sample():
    mean, std = latents(torch.float64), latents(torch.float64).abs()
    z = sample_posterior(mean, std, KEYS, DRAWS, SEED, 0.18215, 0.5)
    noise = torch.cat([normal(KEYS, DRAWS, s, SEED, SHAPE, torch.float64) for s in (Stream.VAE_WIN, Stream.VAE_LOSE)])
    torch.testing.assert_close(z, (mean + std * noise - 0.5) * 0.18215, rtol=1e-14, atol=1e-14)
    narrow = sample_posterior(mean.bfloat16(), std.bfloat16(), KEYS, DRAWS, SEED, 0.18215)
    assert narrow.dtype == torch.bfloat16 and not torch.equal(noise[:B], noise[B:])
    assert torch.equal(sample_posterior(mean, std * 0, KEYS, DRAWS, SEED, 1.0), mean)


def test_each_channel_has_its_own_scale_and_shift():
    mean, std = latents(), latents().abs()
    alike = torch.full((SHAPE[0],), 0.18215), torch.full((SHAPE[0],), 0.5)
    assert torch.equal(
        sample_posterior(mean, std, KEYS, DRAWS, SEED, *alike),
        sample_posterior(mean, std, KEYS, DRAWS, SEED, 0.18215, 0.5),
    )
    scale, shift = torch.arange(1.0, SHAPE[0] + 1), torch.linspace(-1, 1, SHAPE[0])
    z = sample_posterior(mean, std, KEYS, DRAWS, SEED, scale, shift)
    plain = sample_posterior(mean, std, KEYS, DRAWS, SEED, 1.0)
    torch.testing.assert_close(z, (plain - shift.view(-1, 1, 1)) * scale.view(-1, 1, 1))
    with pytest.raises(AssertionError, match="a number for each of"):
        sample_posterior(mean, std, KEYS, DRAWS, SEED, torch.ones(SHAPE[0] + 1))


def by_channel(x):
    return torch.linspace(0.1, 0.2, x.shape[1]), torch.linspace(0, 1, x.shape[1])


CALLS = {
    "noise_pairs": (
        torch.ops.csrc_triton.noise_pairs,
        lambda x: (x, TIMESTEPS, *(table.float() for table in PATH), KEYS, DRAWS, SEED, torch.bfloat16),
    ),
    "sample_posterior": (
        torch.ops.csrc_triton.sample_posterior,
        lambda x: (x, x.abs(), KEYS, DRAWS, SEED, *by_channel(x)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(name, memory_format):
    op, arguments = CALLS[name]
    torch.library.opcheck(op, arguments(latents().to(memory_format=memory_format)))


def test_compiles_into_one_graph():
    def function(mean, std):
        x = sample_posterior(mean, std, KEYS, DRAWS, SEED, 0.18)
        return noise_pairs(x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED), x

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = latents()
    for actual, expected in zip(compiled(x, x.abs()), function(x, x.abs())):
        assert torch.equal(actual, expected)


def test_references_are_the_ops_on_the_cpu():
    x = latents()
    arguments = (x, TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    assert torch.equal(noise_pairs(*arguments), noise_pairs_reference(*arguments))
    arguments = (x, x.abs(), KEYS, DRAWS, SEED, 0.18)
    assert torch.equal(sample_posterior(*arguments), sample_posterior_reference(*arguments))


def test_refusals():
    x = latents()
    with pytest.raises(AssertionError, match=r"latents must be \[2B, C, H, W\]"):
        noise_pairs(x[:5], TIMESTEPS, *PATH, KEYS, DRAWS, SEED)
    with pytest.raises(AssertionError, match="timesteps must be int64"):
        noise_pairs(x, TIMESTEPS.int(), *PATH, KEYS, DRAWS, SEED)
    with pytest.raises(AssertionError, match="signal and spread must both be"):
        noise_pairs(x, TIMESTEPS, ALPHAS, ALPHAS[:5], KEYS, DRAWS, SEED)
    with pytest.raises(AssertionError, match="std"):
        sample_posterior(x, x[:2], KEYS, DRAWS, SEED, 1.0)

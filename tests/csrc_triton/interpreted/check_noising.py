"""The noising kernels in the interpreter: the bits of plain torch, which test_noising.py compares with float64."""

import pytest
import torch

from csrc_triton.noising import _launch_noise, _launch_posterior, noise_pairs_reference, sample_posterior_reference

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
PATH = (ALPHAS.sqrt().float(), (1 - ALPHAS).sqrt().float())  # signal, spread
QUICK = [
    (1, (4, 8, 8), torch.float32, torch.bfloat16, "contiguous"),
    (2, (3, 5, 7), torch.bfloat16, torch.bfloat16, "channels_last"),
    (3, (4, 17, 19), torch.float32, torch.float16, "offset"),
]
LAYOUTS = ("contiguous", "channels_last", "offset", "strided")
FULL = [  # layouts take turns
    (batch, shape, dtype, dtype, LAYOUTS[(batch + j + k) % 4])
    for batch in (1, 2, 3, 4, 5)
    for j, shape in enumerate([(1, 1, 1), (4, 13, 11), (4, 16, 24), (16, 9, 9)])
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
]


def arrange(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, dim=3)[..., ::2]
    return x + 30 if layout == "offset" else x


def run(batch, shape, dtype, out_dtype, layout):
    generator = torch.Generator().manual_seed(batch)
    x = arrange(torch.randn(2 * batch, *shape, generator=generator).to(dtype), layout)
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
    draws, seed = torch.arange(batch), torch.tensor(99)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    arguments = (x, timesteps, *PATH, keys, draws, seed)
    noisy, expected = _launch_noise(*arguments, out_dtype), noise_pairs_reference(*arguments, out_dtype=out_dtype)
    assert torch.equal(noisy, expected) and noisy.dtype == expected.dtype and noisy.stride() == expected.stride()
    std = x.abs().contiguous()
    scale, shift = torch.randn(2, shape[0], generator=generator)
    sample = _launch_posterior(x, std, keys, draws, seed, scale, shift)
    expected = sample_posterior_reference(x, std, keys, draws, seed, scale, shift)
    assert torch.equal(sample, expected) and sample.stride() == expected.stride()


@pytest.mark.parametrize("batch, shape, dtype, out_dtype, layout", QUICK)
def test_bits_of_plain_torch(batch, shape, dtype, out_dtype, layout):
    run(batch, shape, dtype, out_dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("batch, shape, dtype, out_dtype, layout", FULL)
def test_full_grid(batch, shape, dtype, out_dtype, layout):
    run(batch, shape, dtype, out_dtype, layout)

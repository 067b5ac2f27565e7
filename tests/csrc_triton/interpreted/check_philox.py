"""Philox in the interpreter: the Triton twins give the bits of plain torch."""

import pytest
import torch
import triton
import triton.language as tl

from csrc_triton.elementary import log_fp32, torch_log_fp32
from csrc_triton.philox import Stream, normal, normal_span, random_bits, random_words

KEYS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF], dtype=torch.int64)


@triton.jit
def words_kernel(key_ptr, draw_ptr, seed_ptr, out_ptr, STREAM: tl.constexpr, BLOCKS: tl.constexpr):
    n = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    words = random_words(block, tl.load(key_ptr + n), tl.load(draw_ptr + n), tl.load(seed_ptr), STREAM)
    for w in tl.static_range(4):
        tl.store(out_ptr + (n * BLOCKS + block) * 4 + w, words[w].to(tl.int64))


@triton.jit
def normal_kernel(key_ptr, draw_ptr, seed_ptr, out_ptr, first, STREAM: tl.constexpr, COUNT: tl.constexpr):
    n = tl.program_id(0)
    numbers = normal_span(first, tl.load(key_ptr + n), tl.load(draw_ptr + n), tl.load(seed_ptr), STREAM, COUNT)
    tl.store(out_ptr + n * COUNT + tl.arange(0, COUNT), numbers)


@triton.jit
def log_kernel(x_ptr, log_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(log_ptr + i, log_fp32(tl.abs(x)))


@pytest.mark.parametrize("seed", [0, 42, -1, 2**40 + 3])
@pytest.mark.parametrize("stream", [Stream.NOISE, Stream.LABEL])
def test_words_are_the_bits_of_plain_torch(seed, stream):
    draws = torch.arange(len(KEYS)) * 7
    out = torch.empty(len(KEYS), 64, dtype=torch.int64)
    words_kernel[(len(KEYS),)](KEYS, draws, torch.tensor(seed), out, STREAM=int(stream), BLOCKS=16)
    assert torch.equal(out, random_bits(KEYS, draws, stream, seed, 64))


@pytest.mark.parametrize("first", [0, 3, 2**20])
def test_normals_are_the_bits_of_plain_torch(first):
    keys = torch.arange(32) * 0x1234567
    draws, seed = torch.arange(32), torch.tensor(9)
    out = torch.empty(32, 256)
    normal_kernel[(32,)](keys, draws, seed, out, first, STREAM=0, COUNT=256)
    if first < 1000:
        assert torch.equal(out, normal(keys, draws, Stream.NOISE, seed, (4 * first + 256,))[:, 4 * first :])
    assert out.std().sub(1).abs() < 0.05


def test_the_logarithm():
    x = torch.cat([torch.linspace(-80, 80, 1021), torch.tensor([1e-9, -1e-9, 0.25])])
    log = torch.empty(1024)
    log_kernel[(1,)](x, log, N=1024)
    assert torch.equal(log, torch_log_fp32(x.abs()))
    torch.testing.assert_close(log.double(), x.double().abs().log(), rtol=2e-7, atol=2e-7)

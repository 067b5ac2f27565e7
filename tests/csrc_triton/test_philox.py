"""Philox in plain torch: published vectors, counter layout, distributions, refusals. The Triton twins: check_philox.py."""

import math

import pytest
import torch

from csrc_triton.elementary import torch_cos_sin_turns, torch_log_fp32, torch_sqrt_rn
from csrc_triton.philox import MASK, Stream, _box_muller, integers, normal, philox_4x32, random_bits, uniform

KEYS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
DRAWS = torch.arange(6)


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, key, words):
    assert philox_4x32(torch.tensor(counter), torch.tensor(key)).tolist() == words


def test_against_python_integers():
    """Ten rounds in unbounded integers, written from the paper, on counters and keys with all bits in play."""

    def rounds(c, k):
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
            k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
        return c

    generator = torch.Generator().manual_seed(0)
    counters, keys = (torch.randint(0, 2**32, (50, n), generator=generator) for n in (4, 2))
    assert philox_4x32(counters, keys).tolist() == [rounds(c, k) for c, k in zip(counters.tolist(), keys.tolist())]


def test_counter_layout():
    """Element e of a key is word e % 4 of the block (e // 4, draw, stream, seed) under (low, high) of the key."""
    seed = 2**32 + 77  # taken modulo 2^32
    bits = random_bits(KEYS, DRAWS, Stream.CROP, seed, 11)
    assert bits.shape == (6, 11)
    for n, e in ((0, 0), (2, 5), (3, 10), (4, 7), (5, 3)):
        key = KEYS[n].item() % 2**64
        counter = torch.tensor([e // 4, n, int(Stream.CROP), 77])
        assert bits[n, e] == philox_4x32(counter, torch.tensor([key & MASK, key >> 32]))[e % 4]


def test_seed_may_be_a_tensor_or_an_int():
    expected = random_bits(KEYS, DRAWS, Stream.NOISE, 5, 8)
    assert torch.equal(random_bits(KEYS, DRAWS, Stream.NOISE, torch.tensor(5), 8), expected)
    with pytest.raises(AssertionError, match="seed must be one int64"):
        random_bits(KEYS, DRAWS, Stream.NOISE, torch.tensor(5.0), 8)
    with pytest.raises(AssertionError, match="must be int64"):
        random_bits(KEYS.float(), DRAWS, Stream.NOISE, 5, 8)


def test_every_part_of_the_counter_matters():
    base = random_bits(KEYS[:1], DRAWS[:1], Stream.NOISE, 5, 8)
    others = [
        random_bits(KEYS[1:2], DRAWS[:1], Stream.NOISE, 5, 8),
        random_bits(KEYS[:1] + 2**32, DRAWS[:1], Stream.NOISE, 5, 8),
        random_bits(KEYS[:1], DRAWS[1:2], Stream.NOISE, 5, 8),
        random_bits(KEYS[:1], DRAWS[:1], Stream.FLIP, 5, 8),
        random_bits(KEYS[:1], DRAWS[:1], Stream.NOISE, 6, 8),
    ]
    assert all((other != base).all() for other in others)


def test_streams_are_frozen():
    names = [
        "NOISE",
        "TIMESTEP",
        "VAE_WIN",
        "VAE_LOSE",
        "DROPOUT",
        "FLIP",
        "CROP",
        "ORDER",
        "SPLIT",
        "ROUNDING",
        "LABEL",
        "ADAPTER",
    ]
    assert [stream.name for stream in Stream] == names and list(Stream) == list(range(len(names)))


def test_independent_of_batch_and_global_generator():
    state = torch.get_rng_state()
    together = normal(KEYS, DRAWS, Stream.NOISE, 1, (3, 5, 7))
    apart = torch.cat([normal(KEYS[n : n + 1], DRAWS[n : n + 1], Stream.NOISE, 1, (3, 5, 7)) for n in range(6)])
    assert torch.equal(together, apart)
    assert torch.equal(together.flatten(1), normal(KEYS, DRAWS, Stream.NOISE, 1, (105,)))  # C-contiguous element order
    assert torch.equal(normal(KEYS, DRAWS, Stream.NOISE, 1, (50,)), together.flatten(1)[:, :50])
    assert torch.equal(torch.get_rng_state(), state)


def test_uniform():
    u = uniform(KEYS, DRAWS, Stream.DROPOUT, 3, 4000)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert torch.equal(u, (random_bits(KEYS, DRAWS, Stream.DROPOUT, 3, 4000) >> 8).float() / 2**24)
    assert (u.mean() - 0.5).abs() < 0.01 and (u.var() - 1 / 12).abs() < 0.003


def test_integers():
    keys = torch.arange(20_000)
    t = integers(keys, torch.zeros_like(keys), Stream.TIMESTEP, 0, 200, 210)
    counts = torch.bincount(t - 200, minlength=10)
    assert t.dtype == torch.int64 and t.min() == 200 and t.max() == 209
    assert ((counts - 2000).square().sum() / 2000) < 27.9  # chi squared with 9 degrees of freedom, p = 0.001
    assert (integers(keys, keys, Stream.TIMESTEP, 0, 999, 1000) == 999).all()
    with pytest.raises(AssertionError, match="empty"):
        integers(keys, keys, Stream.TIMESTEP, 0, 5, 5)


def test_normals_are_normal():
    n = normal(torch.arange(50), torch.zeros(50, dtype=torch.int64), Stream.NOISE, 11, (4000,), torch.float64)
    assert (
        abs(n.mean()) < 0.01
        and abs(n.var() - 1) < 0.015
        and abs(n.pow(3).mean()) < 0.03
        and abs(n.pow(4).mean() - 3) < 0.1
    )
    probabilities = torch.tensor([0.001, 0.05, 0.5, 0.8, 0.999], dtype=torch.float64)
    quantiles = math.sqrt(2) * torch.erfinv(2 * probabilities - 1)
    assert ((n.flatten()[:, None] < quantiles).double().mean(0) - probabilities).abs().max() < 0.004
    assert abs((n[:, 0::2] * n[:, 1::2]).mean()) < 0.01  # the two numbers of one angle are uncorrelated


def test_fp32_normals_agree_with_float64():
    draws = torch.zeros(50, dtype=torch.int64)
    fp32, fp64 = (
        normal(torch.arange(50), draws, Stream.NOISE, 11, (4001,), dtype) for dtype in (torch.float32, torch.float64)
    )
    assert (fp32 - fp64).abs().max() < 1e-6
    assert torch.equal(normal(torch.arange(50), draws, Stream.NOISE, 11, (4001,), torch.bfloat16), fp32.bfloat16())


def test_tails_are_finite_and_accurate():
    words = torch.cat([torch.arange(300), 2**32 - 1 - torch.arange(300), 2 ** torch.arange(32)])
    angles = torch.arange(0, 2**32, 2**32 // 63)
    radius, angle = (x.flatten() for x in torch.meshgrid(words, angles, indexing="ij"))
    for fp32, fp64 in zip(_box_muller(radius, angle, torch.float32), _box_muller(radius, angle, torch.float64)):
        assert fp32.isfinite().all() and (fp32 - fp64).abs().max() < 1e-6
    assert 6.6 < _box_muller(torch.tensor([0]), torch.tensor([0]), torch.float32)[0].item() < 6.8


def test_elementary_functions():
    x = torch.cat([torch.logspace(-37, 37, 20_001, dtype=torch.float64).float(), 1 + torch.arange(-64, 65) * 2.0**-24])
    exact = x.double().log()
    assert ((torch_log_fp32(x) - exact).abs() <= 1.2e-7 * exact.abs()).all()
    assert torch_log_fp32(torch.tensor([1.0, 2.0])).tolist() == [0.0, torch.tensor(2.0).log().item()]
    turns = torch.arange(0, 2**24, 997)
    cosine, sine = torch_cos_sin_turns(turns)
    angle = turns.double() * (2 * math.pi / 2**24)
    assert (cosine - angle.cos()).abs().max() < 1.2e-7 and (sine - angle.sin()).abs().max() < 1.2e-7
    root = torch_sqrt_rn(x)
    neighbours = torch.stack([torch.nextafter(root, torch.tensor(bound)) for bound in (0.0, math.inf)])
    assert ((root.double() - x.double().sqrt()).abs() <= (neighbours.double() - x.double().sqrt()).abs()).all()

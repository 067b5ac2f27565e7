"""AdamW8bit's kernels in the interpreter: codes nearest, updates as the reference, stochastic rounding with the same
bits.
"""

import pytest
import torch
import triton
import triton.language as tl

from csrc_triton.adamw8bit import AdamW8bit
from csrc_triton.dynamic_map import LEVELS, MIDPOINTS, quantise_signed, quantise_unsigned
from csrc_triton.parts import Part


@triton.jit
def quantise_kernel(x_ptr, out_ptr, SIGNED: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    one = tl.full([1, 1], 1.0, tl.float32)
    if SIGNED:
        tl.store(out_ptr + i, quantise_signed(x, one))
    else:
        tl.store(out_ptr + i, quantise_unsigned(x, one))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest(signed):
    """Every level maps to itself, and every other value to its nearest level (but for rounding at the midpoints)."""
    levels, midpoints = LEVELS[signed], MIDPOINTS[signed]
    spread = torch.cat([10.0 ** torch.linspace(-8, 0, 3000), torch.linspace(0, 1, 584)])
    spread = torch.cat([spread[::2], -spread[::2]]) if signed else spread
    x = torch.cat([levels, midpoints * (1 + 1e-5), midpoints * (1 - 1e-5), spread])
    x = torch.cat([x, torch.zeros(8192 - len(x))]).clamp(-1, 1)
    codes = torch.empty(8192, dtype=torch.int32)
    quantise_kernel[(1,)](x, codes, SIGNED=signed, N=8192)
    assert torch.equal(codes[:256], torch.arange(256, dtype=torch.int32))
    nearest = torch.bucketize(x, midpoints).int()
    if not signed:
        nearest = torch.where(x > 0, nearest.clamp_min(1), nearest)
    assert torch.equal(codes, nearest)


def optimizers(dtype, sizes, generator, gradient=None, **options):
    values = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    both = []
    for _ in range(2):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        for p in params:
            p.grad_dtype = gradient or dtype
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(3e-3), "weight_decay": 0.3}]
        both.append(AdamW8bit(groups, lr=1e-3, seed=5, **options))
    both[0]._reference_step, both[0]._launch_step = both[0]._launch_step, both[0]._reference_step
    return both


@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_steps_agree_with_the_reference(dtype, gradient):
    """Same codes but where rounding meets a midpoint, same weights to rounding; for bf16 nearly all weights are equal."""
    generator = torch.Generator().manual_seed(0)
    kernel, reference = optimizers(dtype, [(40, 130), (7,), (4099,), (64, 64), (33, 3)], generator, gradient)
    skipped = kernel._parameters[3][0], reference._parameters[3][0]
    scalars = {"clip": torch.tensor([0.7]), "inv_scale": torch.tensor([1 / 64])}
    for step in range(4):
        for (a, _), (b, _) in zip(kernel._parameters, reference._parameters, strict=True):
            grad = (64 * torch.randn(a.shape, generator=generator)).to(gradient)
            a.grad, b.grad = grad.clone(), grad
        if step == 1:
            skipped[0].grad = skipped[1].grad = None
        for optimizer in (kernel, reference):
            optimizer.step(found_inf=torch.tensor([float(step == 2)]), **scalars)
    ours, theirs = kernel.state_tensors(), reference.state_tensors()
    assert ours["step"].item() == theirs["step"].item() == 3
    for name in ("m_max", "v_max", "m_fp32", "v_fp32"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-9)
    for name in ("m_8bit", "v_8bit"):
        assert (ours[name] != theirs[name]).float().mean() < 2e-3
    for (a, _), (b, _) in zip(kernel._parameters, reference._parameters, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=2e-5
            )  # a code that differs moves its weight by a part of lr
        else:
            assert (a != b).float().mean() < 5e-3


def test_the_same_steps_give_the_same_bits():
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        kernel, _ = optimizers(torch.bfloat16, [(50, 100), (9,), (4096,)], generator)
        for p, _ in kernel._parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        kernel.step()
        runs.append([p.detach() for p, _ in kernel._parameters] + list(kernel.state_tensors().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_parameter_at_a_time_launches_the_same_update():
    """Also where a gradient comes back at another address."""
    runs = []
    for alone in (False, True):
        generator = torch.Generator().manual_seed(1)
        kernel, _ = optimizers(torch.bfloat16, [(50, 100), (9,), (4096,)], generator, torch.float32)
        kept = []
        for _ in range(3):
            for p, _ in kernel._parameters:
                kept.append(torch.randn(p.shape, generator=generator))  # no address is used again
                p.grad = kept[-1]
            if alone:
                kernel._refresh_hyper(), kernel._launch_begin(kernel._zero)
                for key in (2, 0, 1):
                    kernel._launch_one(key, kernel._one, kernel._one, kernel._zero)
            else:
                kernel.step()
        runs.append([p.detach() for p, _ in kernel._parameters] + list(kernel.state_tensors().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_sizes(dtype):
    generator = torch.Generator().manual_seed(2)
    kernel, reference = optimizers(dtype, [(n,) for n in (1, 3, 255, 4095, 4096, 4097, 5000, 8192, 20011)], generator)
    for _ in range(6):
        for (a, _), (b, _) in zip(kernel._parameters, reference._parameters, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.clone()
        kernel.step(), reference.step()
    for (a, _), (b, _) in zip(kernel._parameters, reference._parameters, strict=True):
        assert (a.float() - b.float()).abs().mean() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_have_the_bits_of_the_whole(dtype):
    """A small tensor is cut inside a quad of random numbers, a quantised one between two blocks."""
    generator = torch.Generator().manual_seed(3)
    values, grads = ([torch.randn(n, generator=generator).to(dtype) for n in (7, 4099)] for _ in range(2))
    cuts = (3, 512)

    def stepped(pick, parts):
        params = [torch.nn.Parameter(value[place].clone()) for value, place in zip(values, pick, strict=True)]
        optimizer = AdamW8bit(params, lr=1e-2, seed=5, parts=parts)
        for p, grad, place in zip(params, grads, pick, strict=True):
            p.grad = grad[place].clone()
        optimizer._reference_step = optimizer._launch_step
        optimizer.step()
        return [p.detach() for p in params]

    whole = stepped([slice(None)] * 2, None)
    shards = [
        stepped(
            [slice(cut) if rank == 0 else slice(cut, None) for cut in cuts],
            [Part((cut, len(value) - cut), rank, 0) for value, cut in zip(values, cuts, strict=True)],
        )
        for rank in range(2)
    ]
    for index, value in enumerate(whole):
        assert torch.equal(value, torch.cat([shard[index] for shard in shards]))

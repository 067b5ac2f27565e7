"""AdamW8bit on the CPU: the map, accuracy beside bitsandbytes, bf16 weights, state, refusals."""

import copy

import pytest
import torch
from bitsandbytes import functional

from csrc_triton import adamw8bit
from csrc_triton.adamw8bit import AdamW8bit, round_stochastic
from csrc_triton.dynamic_map import LEVELS
from csrc_triton.parts import MIN_8BIT_ELEMENTS


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    """To fp32 rounding: bitsandbytes forms the levels in fp32, here they are formed in fp64 and rounded once."""
    torch.testing.assert_close(LEVELS[signed], functional.create_dynamic_map(signed=signed), rtol=2e-7, atol=0)


def parameters(sizes=((64, 100), (50,)), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def train(optimizer, params, steps, seed=1):
    """Gradients of very different sizes along a tensor, as in a network; each step is a pure function of (seed, step)."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in params:
            scale = 10 ** torch.linspace(-4, 0, p.numel(), dtype=torch.float64).reshape(p.shape)
            p.grad = (scale * (torch.randn(p.shape, generator=generator) + 0.3)).to(p.dtype)
        optimizer.step()
    return params


def test_error_is_no_worse_than_that_of_bitsandbytes():
    import bitsandbytes

    sizes, options = ((128, 256), (64, 64)), {"lr": 1e-3, "weight_decay": 0.1}
    start = parameters(sizes)
    exact = [torch.nn.Parameter(p.detach().double()) for p in start]
    train(torch.optim.AdamW(exact, **options), exact, 30)
    errors = []
    for kind in (AdamW8bit, bitsandbytes.optim.AdamW8bit):
        params = copy.deepcopy(start)
        train(kind(params, **options), params, 30)
        errors.append(sum((p.double() - e).square().sum().item() for p, e in zip(params, exact, strict=True)) ** 0.5)
    assert errors[0] <= errors[1], errors


def test_small_tensors_are_exact_adamw():
    ours, theirs = parameters(((7, 9), (MIN_8BIT_ELEMENTS - 1,))), parameters(((7, 9), (MIN_8BIT_ELEMENTS - 1,)))
    train(AdamW8bit(ours, lr=1e-2, weight_decay=0.1), ours, 20)
    train(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_state_is_one_byte_an_element():
    optimizer = AdamW8bit(parameters(((512, 512),)))
    size = sum(t.numel() * t.element_size() for name, t in optimizer.state_tensors().items() if name[0] in "mv")
    assert size == 2 * (512 * 512 + 4 * 512 * 512 // 256)


def test_bf16_weights_follow_fp32_on_average():
    """Updates far below bf16's resolution, of decay alone: nearest rounding would keep every weight."""
    params = [torch.nn.Parameter(torch.full((100_000,), 1.0, dtype=torch.bfloat16))]
    optimizer = AdamW8bit(params, lr=1e-3, weight_decay=0.1, eps=1e-8)
    for _ in range(20):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    assert abs(params[0].double().mean().item() - (1 - 1e-4) ** 20) < 1e-4


def test_stochastic_rounding_is_unbiased_and_keyed():
    w = torch.full((200_000,), 1.0 + 2**-9)  # a quarter of the way between two bf16 numbers
    rounded = round_stochastic(w, key=3, step=5, seed=7)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((rounded > 1).double().mean().item() - 0.25) < 0.005
    assert torch.equal(rounded, round_stochastic(w, key=3, step=5, seed=7))
    assert not torch.equal(rounded, round_stochastic(w, key=3, step=6, seed=7))
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastic(exact.float(), 0, 0, 0), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_a_tensor_have_the_bits_of_the_whole(dtype, monkeypatch):
    found = []
    for piece in (2**40, 2 * adamw8bit.BLOCK):
        monkeypatch.setattr(adamw8bit, "PIECE", piece)
        params = parameters(((70, 101), (MIN_8BIT_ELEMENTS - 1,)), dtype)
        optimizer = AdamW8bit(params, lr=1e-2, seed=3)
        found.append((train(optimizer, params, 3), optimizer.state_tensors()))
    (whole, states), (pieces, others) = found
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert all(torch.equal(states[name], others[name]) for name in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype):
    straight = parameters(dtype=dtype)
    whole = AdamW8bit(straight, lr=1e-2, seed=3)
    train(whole, straight, 3)
    saved, weights = copy.deepcopy(whole.state_dict()), [p.detach().clone() for p in straight]
    train(whole, straight, 3, seed=2)

    resumed = [torch.nn.Parameter(w) for w in weights]
    optimizer = AdamW8bit(resumed, lr=9.0)
    optimizer.load_state_dict(saved)
    train(optimizer, resumed, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert all(torch.equal(whole.state_tensors()[name], t) for name, t in optimizer.state_tensors().items())


def test_foreign_and_unfitting_states_are_refused():
    import bitsandbytes

    params = parameters()
    theirs = bitsandbytes.optim.AdamW8bit(params)
    train(theirs, params, 1)
    with pytest.raises(ValueError, match="bitsandbytes"):
        AdamW8bit(parameters()).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="not an AdamW8bit state"):
        AdamW8bit(parameters()).load_state_dict(torch.optim.AdamW(params).state_dict())
    with pytest.raises(ValueError, match="other parameters"):
        AdamW8bit(parameters()).load_state_dict(AdamW8bit(parameters(((100, 64), (51,)))).state_dict())
    with pytest.raises(ValueError, match="every parameter group"):
        AdamW8bit(parameters()).add_param_group({"params": parameters()})


def test_scale_clip_and_skip():
    plain, scaled = parameters(), parameters()
    train(AdamW8bit(plain, lr=1e-2), plain, 1)
    optimizer = AdamW8bit(scaled, lr=1e-2)
    train(type("Zero", (), {"step": lambda self: None})(), scaled, 1)  # gradients only
    for p in scaled:
        p.grad *= 1024
    before = [p.detach().clone() for p in scaled]
    optimizer.step(inv_scale=torch.tensor([1 / 512]), clip=torch.tensor([0.5]), found_inf=torch.tensor([1.0]))
    assert (
        all(torch.equal(a, b) for a, b in zip(scaled, before, strict=True))
        and optimizer.state_tensors()["step"].item() == 0
    )
    optimizer.step(inv_scale=torch.tensor([1 / 512]), clip=torch.tensor([0.5]))
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))


KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "gradient"), KINDS)
def test_one_parameter_at_a_time_is_the_same_update(dtype, gradient):
    """In any order, each gradient freed before the next one is there; a skipped update counts nowhere."""
    whole, parts = parameters(dtype=dtype), parameters(dtype=dtype)
    for p in (*whole, *parts):
        p.grad_dtype = gradient
    one, other = AdamW8bit(whole, lr=1e-2, seed=3), AdamW8bit(parts, lr=1e-2, seed=3)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        skip, clip = torch.tensor([float(step == 1)]), torch.tensor([0.3])
        for p in whole:
            p.grad = torch.randn(p.shape, generator=generator).to(gradient)
        one.step(clip=clip, found_inf=skip)
        other.begin(found_inf=skip)
        for key in reversed(range(len(parts))):
            parts[key].grad = whole[key].grad
            other.step_one(key, clip=clip, found_inf=skip)
            parts[key].grad = None
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert all(torch.equal(other.state_tensors()[name], t) for name, t in one.state_tensors().items())
    assert one.state_tensors()["step"].item() == 3


def test_fp32_gradients_of_bf16_weights_are_not_rounded():
    """The update is that of fp32 weights with the same gradients, rounded once at its end."""
    (half,) = parameters(((64, 100),), torch.bfloat16)
    wide = torch.nn.Parameter(half.detach().float())
    half.grad_dtype = torch.float32
    half.grad = torch.randn(64, 100, generator=torch.Generator().manual_seed(9))
    wide.grad = half.grad.clone()
    AdamW8bit([half], lr=1e-2, seed=7).step()
    AdamW8bit([wide], lr=1e-2, seed=7).step()
    assert torch.equal(half.detach().flatten(), round_stochastic(wide.detach().flatten(), key=0, step=1, seed=7))


def test_a_gradient_of_another_dtype_is_refused():
    (weight,) = parameters(((64, 100),), torch.bfloat16)
    weight.grad_dtype = torch.float32
    optimizer = AdamW8bit([weight])
    weight.grad_dtype = None
    weight.grad = torch.zeros(64, 100)
    with pytest.raises(AssertionError, match=r"gradient torch.float32 of a torch.bfloat16 parameter"):
        optimizer.step()


def test_learning_rate_tensor_and_memory_formats():
    generator = torch.Generator().manual_seed(0)
    value, grad = torch.randn(2, 16, 24, 3, 5, generator=generator)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(value.clone().to(memory_format=form))
        p.grad = grad.clone()  # contiguous: the optimizer brings it into the weight's layout
        AdamW8bit([p], lr=torch.tensor(1e-2)).step()
        results.append(p.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_does_not_start_on_16_bytes_is_copied():
    """DistributedDataParallel packs gradients without gaps; the kernel reads sixteen bytes at a time."""
    p = torch.nn.Parameter(torch.zeros(6))
    p.grad = torch.arange(7.0)[1:]
    assert p.grad.data_ptr() % 16
    AdamW8bit([p], lr=1.0, weight_decay=0.0).step()
    assert p.grad.data_ptr() % 16 == 0 and p.grad.tolist() == [1, 2, 3, 4, 5, 6]


def test_only_addresses_are_read_again_where_gradients_have_moved(monkeypatch):
    optimizer = AdamW8bit(parameters(), lr=1e-3)
    made = []
    chunks = adamw8bit.chunks_of
    monkeypatch.setattr(adamw8bit, "chunks_of", lambda *args: made.append(args) or chunks(*args))
    tables, kept = [], []
    for _ in range(3):
        for p, _ in optimizer._parameters:
            kept.append(p.grad)
            p.grad = torch.zeros_like(p)
        optimizer._refresh_table()
        tables.append(optimizer._table)
    assert len(made) == 2, "one list a kind, made at the first update"
    assert [int(table[0, 1]) for table in tables] == [
        g.data_ptr() for g in (*kept[2::2], optimizer._parameters[0][0].grad)
    ]
    optimizer._refresh_table()
    assert optimizer._table is tables[-1]

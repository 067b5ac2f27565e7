"""dpo.models.attention: the bits of diffusers' own processor, one operation with its statistics always kept, and its choice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.models import attention, lora
from dpo.models.attention import BACKENDS, Attending, probe, use_one_attention, widths, without_cudnn
from dpo.models.denoiser import _recomputed, _recomputed_on_the_same
from dpo.models.load import load
from tests.dpo.models.test_denoiser import KINDS, run, unets  # noqa: F401  (a fixture)
from tests.help.operations import Operations

CPU = torch.device("cpu")


@pytest.mark.long
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_bits_in_fewer_operations(unets, kind, dtype):  # noqa: F811
    found = []
    for ours in (False, True):
        unet = copy.deepcopy(unets[kind])
        if kind == "sdxl":
            lora.add(unet, rank=2, alpha=2.0, target_modules=("to_q", "to_out.0"), dropout=0.0, seed=1)
        unet.set_attn_processor(AttnProcessor2_0())
        if ours:
            use_one_attention(unet, CPU, torch.float32)
            assert {type(p) for p in unet.attn_processors.values()} == {Attending}
        with torch.no_grad():
            free = run(unet, dtype)
        with Operations() as counted:
            kept = run(unet, dtype)
            kept.float().square().sum().backward()
        grads = [p.grad for p in unet.parameters() if p.grad is not None]
        assert torch.equal(free, kept.detach()) and grads
        found.append((kept.detach(), *grads, counted.found["aten.div.Tensor"], len(unet.attn_processors)))
    (*plain, many, count), (*own, few, _) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, own, strict=True))
    assert many - few == 2 * count, "a division forward and one backward for each attention"


class Seen(TorchDispatchMode):
    """Keeps the arguments of attention operations."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_scaled_dot_product" in str(func) and "backward" not in str(func):
            self.calls.append((str(func).split(".")[1], args[3:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_the_operation_and_its_statistics_do_not_depend_on_the_gradient(name):
    """On tensors without memory, which take the operations of a GPU."""
    q, k, v = (torch.empty(2, 4, n, 40, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (64, 77, 77))
    with Seen() as seen:
        BACKENDS[name](q, k, v).sum().backward()
        with torch.no_grad():
            BACKENDS[name](q, k, v)
    assert q.grad.shape == q.shape
    first, second = seen.calls
    assert first == second and name in first[0]
    assert name == "flash" or first[1][:2] == (None, True), "no bias, statistics kept"


def test_masks_and_other_kinds_of_attention_keep_diffusers_way(unets):  # noqa: F811
    unet = copy.deepcopy(unets["sd15"])
    use_one_attention(unet, CPU, torch.float32)
    attn = next(m for m in unet.modules() if isinstance(m, Attention))
    own = attn.processor
    own.backends = {next(iter(widths(unet))): "cudnn"}  # which a CPU does not have
    x, mask = torch.randn(2, 9, attn.query_dim), torch.zeros(2, 1, 9)
    assert torch.equal(own(attn, x, attention_mask=mask), AttnProcessor2_0()(attn, x, attention_mask=mask))
    attn.residual_connection = True
    assert torch.equal(attn(x), AttnProcessor2_0()(attn, x))


def by_gradient(q, k, v):
    return F.scaled_dot_product_attention(q, k, v) * (1 + 2.0**-6 * torch.is_grad_enabled())


def failing(q, k, v):
    if q.shape[-1] == 160:
        raise RuntimeError("No valid execution plans built.\nmore lines")
    return F.scaled_dot_product_attention(q, k, v)


def infinite(q, k, v):
    return F.scaled_dot_product_attention(q, k, v) * torch.exp(1000 * q.sum().abs())


STAND_INS = {"moody": by_gradient, "narrow": failing, "wild": infinite, "sound": F.scaled_dot_product_attention}


def test_the_first_that_serves_is_taken_and_what_does_not_is_said():
    found, said = probe(CPU, torch.float32, [40, 160], ["narrow", "sound"], STAND_INS)
    assert found == {40: "narrow", 160: "sound"}
    assert said == [
        "attention, head width 160: sound for policy and reference (narrow: No valid execution plans built.)",
        "attention: narrow for head width 40, sound for head width 160",
    ]
    found, said = probe(CPU, torch.float32, [64], ["moody", "wild"], STAND_INS)
    assert not found
    assert said == [
        "attention, head width 64: torch chooses for policy and reference "
        "(moody: other bits with a gradient than without; wild: a gradient that is not finite)"
    ]


def test_what_is_asked_of_a_gpu(monkeypatch, unets):  # noqa: F811
    """cuDNN's and the memory-efficient one are not tried where one order of sums is asked for."""
    asked = []
    monkeypatch.setattr(attention, "probe", lambda *args: asked.append(args) or ({8: "math"}, []))
    attention._chosen.cache_clear()
    gpu = torch.device("cuda")
    for _ in range(2):  # policy and reference
        unet = copy.deepcopy(unets["sd15"])
        use_one_attention(unet, gpu, torch.bfloat16)
        assert {tuple(p.backends.items()) for p in unet.attn_processors.values()} == {((8, "math"),)}
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    use_one_attention(copy.deepcopy(unets["sd15"]), gpu, torch.bfloat16)
    assert [args[3] for args in asked] == [tuple(BACKENDS), ("flash", "math")]
    assert all(args[:3] == (gpu, torch.bfloat16, tuple(widths(unets["sd15"]))) for args in asked)
    attention._chosen.cache_clear()


@pytest.fixture
def transformer(world):
    return load(world("sd35"))


def seen_by(model) -> list[bool]:
    """Whether cuDNN's attention is allowed, each time that the first block runs in a forward and a backward pass."""
    seen: list[bool] = []
    block = model.denoiser.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *given: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    text = model.family.encode(model, ["a fox"])
    model.denoiser.requires_grad_(True)
    model.denoise(model.denoiser)(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), text, None).sum().backward()
    return seen


def test_a_transformer_s_attention_is_the_same_where_it_is_computed_again(transformer):
    """The forward pass has left the block of operations when the backward pass computes a block again."""
    without_cudnn(transformer.denoiser)
    transformer.denoiser.enable_gradient_checkpointing(_recomputed_on_the_same)
    assert seen_by(transformer) == [False, False]


def test_left_to_itself_it_would_not_be(transformer):
    without_cudnn(transformer.denoiser)
    transformer.denoiser.enable_gradient_checkpointing(_recomputed)
    assert seen_by(transformer) == [False, True]


def test_a_copy_of_a_transformer_runs_on_its_own_weights(transformer):
    without_cudnn(transformer.denoiser)
    copied = copy.deepcopy(transformer.denoiser)
    with torch.no_grad():
        for parameter in copied.proj_out.parameters():
            parameter.zero_()
        text = transformer.family.encode(transformer, ["a fox"])
        given = torch.ones(1, 4, 8, 8), torch.tensor([500.0]), text, None
        assert not transformer.denoise(copied)(*given).any() and transformer.denoise(transformer.denoiser)(*given).any()

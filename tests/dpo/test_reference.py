"""dpo.reference: at step 0 the reference gives the policy's own bits, on every path, and never moves."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from dpo import reference
from dpo.models import lora
from dpo.models.denoiser import halve, use_checkpointing
from dpo.models.family import Denoise, TextEncoding, families
from tests.dpo.models.test_denoiser import arguments, unets  # noqa: F401
from tests.help.oracle import pair_difference

KINDS = ("sd15", "sd2v", "sdxl")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PRECISIONS = [None, torch.bfloat16, torch.float16]


def denoise(unet: nn.Module) -> Denoise:
    return partial(families()["sdxl" if unet.config.addition_embed_type else "sd"].predict, unet)


def call(predict: Denoise, unet: nn.Module, dtype: torch.dtype | None) -> torch.Tensor:
    """The prediction of `predict` for inputs of `unet`'s shape."""
    args, kwargs = arguments(unet)
    added = kwargs.get("added_cond_kwargs", {"text_embeds": None, "time_ids": None})
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return predict(*args, TextEncoding(kwargs["encoder_hidden_states"], added["text_embeds"]), added["time_ids"])


def move(parameters) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_copy_gives_the_policys_bits(unets, kind, dtype, checkpointing):  # noqa: F811
    unet = copy.deepcopy(unets[kind])
    twin = reference.frozen(unet, dtype)
    unet.requires_grad_(True).train(checkpointing == "on")
    use_checkpointing(unet, checkpointing)
    predict = reference.from_copy(denoise(twin))
    policy, frozen = call(denoise(unet), unet, dtype), call(predict, unet, dtype)
    assert torch.equal(policy, frozen) and policy.requires_grad and not frozen.requires_grad
    target = torch.randn(policy.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pair_difference(policy, frozen, target).abs(), torch.zeros(2))
    policy.float().square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in twin.parameters())

    move(unet.parameters())
    assert torch.equal(call(predict, unet, dtype), frozen)  # the copy shares nothing with the policy
    assert not torch.equal(call(denoise(unet), unet, dtype), frozen)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_off_gives_the_plain_unets_bits(unets, kind, dtype, checkpointing):  # noqa: F811
    unet = copy.deepcopy(unets[kind])
    plain = call(denoise(unets[kind]), unet, dtype).detach()
    layers = lora.add(unet, rank=4, alpha=8, target_modules=TARGETS, dropout=0.0, seed=0)
    if dtype is not None:
        halve(unet, dtype)
    unet.train(checkpointing == "on")
    use_checkpointing(unet, checkpointing)
    predict = reference.from_adapters(denoise(unet), layers)
    policy, frozen = call(denoise(unet), unet, dtype), call(predict, unet, dtype)
    assert torch.equal(policy, frozen)  # the second factor starts at zero
    assert torch.equal(frozen, plain) and not frozen.requires_grad

    move(p for p in unet.parameters() if p.requires_grad)
    moved = call(denoise(unet), unet, dtype)
    assert not torch.equal(moved, frozen) and torch.equal(call(predict, unet, dtype), frozen)
    assert torch.equal(call(denoise(unet), unet, dtype), moved)  # the adapters are on again


def test_a_reference_between_forward_and_backward_leaves_the_gradient_alone(unets):  # noqa: F811
    """The policy's graph is built, then the adapters go off and on; the backward pass must still reach them."""
    gradients = []
    for with_reference in (False, True):
        unet = copy.deepcopy(unets["sd15"])
        layers = lora.add(unet, rank=4, alpha=4, target_modules=TARGETS, dropout=0.0, seed=0)
        move(p for p in unet.parameters() if p.requires_grad)
        output = call(denoise(unet), unet, None)
        if with_reference:
            call(reference.from_adapters(denoise(unet), layers), unet, None)
        output.square().mean().backward()
        gradients.append([p.grad for p in unet.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and all((g != 0).any() for g in gradients[0])


def test_adapters_come_back_after_an_error(unets):  # noqa: F811
    unet = copy.deepcopy(unets["sd15"])
    layers = lora.add(unet, rank=2, alpha=2, target_modules=("to_q",), dropout=0.0, seed=0)
    move(p for p in unet.parameters() if p.requires_grad)
    before = call(denoise(unet), unet, None)
    with pytest.raises(RuntimeError):
        reference.from_adapters(denoise(unet), layers)(
            torch.zeros(1, 3, 8, 8), torch.tensor([1]), TextEncoding(torch.zeros(1, 77, 32)), None
        )
    assert torch.equal(call(denoise(unet), unet, None), before)

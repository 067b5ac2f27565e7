"""The patched UNet equals the plain one, unpatching restores it, and everything that wraps a UNet still works."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

from dpo.models.kernels import patch

DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def make_unet(linear: bool, dtype=torch.float32, levels: int = 2, **options) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32)[:levels], layers_per_block=1, norm_num_groups=8,
        down_block_types=DOWN[:levels], up_block_types=UP[-levels:],
        attention_head_dim=2, cross_attention_dim=12, use_linear_projection=linear, **options,
    )  # fmt: skip
    for parameter in unet.parameters():  # norms away from 1 and 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return unet.to(dtype).train()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sample, context = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 12, generator=generator)
    return sample.to(dtype), torch.tensor([3, 500, 999]), context.to(dtype)


def forward_backward(unet, dtype=torch.float32):
    unet.zero_grad()
    output = unet(*inputs(dtype)).sample
    (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).reshape(output.shape)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_equal_to_rounding_in_value_and_gradient(linear, form):
    """In float64, so that a difference in meaning cannot hide in rounding."""
    unet = make_unet(linear, torch.float64).to(memory_format=form)
    keys = list(unet.state_dict())
    expected, expected_gradients = forward_backward(unet, torch.float64)
    with patch(unet) as patched:
        assert not patched.skipped and patched.counts["ResnetBlock2D"] == 8 and patched.counts["GEGLU"] == 4
        assert list(unet.state_dict()) == keys
        output, gradients = forward_backward(unet, torch.float64)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-7, atol=1e-9, msg=name)


def test_undone_exactly():
    unet = make_unet(False)
    before = {name: set(module.__dict__) for name, module in unet.named_modules()}
    expected = forward_backward(unet)
    patch(unet).undo()
    assert {name: set(module.__dict__) for name, module in unet.named_modules()} == before
    actual = forward_backward(unet)
    assert torch.equal(actual[0], expected[0]) and all(torch.equal(actual[1][k], g) for k, g in expected[1].items())


@pytest.mark.parametrize("autocast", [False, True])
def test_policy_and_reference_agree_bit_for_bit(autocast):
    policy = make_unet(True)
    reference = copy.deepcopy(policy).requires_grad_(False)
    patch(policy), patch(reference)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(policy(*inputs()).sample, reference(*inputs()).sample)


def test_autocast_stays_close_to_float32():
    unet = make_unet(True)
    exact = unet(*inputs()).sample
    errors = []
    for fused in (False, True):
        patched = patch(unet) if fused else None
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((unet(*inputs()).sample.float() - exact).square().mean().sqrt().item())
        if patched:
            patched.undo()
    assert errors[1] <= 1.5 * errors[0], errors


def test_gradient_checkpointing_changes_nothing():
    unet = make_unet(False)
    patch(unet)
    expected = forward_backward(unet)
    unet.enable_gradient_checkpointing(lambda function, *args: checkpoint(function, *args, use_reentrant=False))
    actual = forward_backward(unet)
    assert torch.equal(actual[0], expected[0]) and all(torch.equal(actual[1][k], g) for k, g in expected[1].items())


def test_with_peft_adapters():
    import peft

    unet = make_unet(True, torch.float64).requires_grad_(False)
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_v", "to_out.0", "ff.net.0.proj"], init_lora_weights="gaussian"
    )
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    expected, expected_gradients = forward_backward(unet, torch.float64)
    with patch(unet):
        output, gradients = forward_backward(unet, torch.float64)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-11)
    assert gradients and gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-7, atol=1e-9, msg=name)


def test_unknown_blocks_keep_their_forward_and_are_named():
    unet = make_unet(False, resnet_time_scale_shift="scale_shift")
    expected = unet(*inputs()).sample
    with patch(unet) as patched:
        assert patched.counts["ResnetBlock2D"] == 0 and "down_blocks.0.resnets.0" in patched.skipped
        assert "down_blocks.0.resnets.0" in str(patched)
        torch.testing.assert_close(unet(*inputs()).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_without_graph_break():
    unet = make_unet(True, levels=1)
    patch(unet)
    expected = forward_backward(unet)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs()).sample
    torch.testing.assert_close(output.detach(), expected[0], rtol=1e-5, atol=1e-5)
    unet.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_large_batches_are_upsampled_without_a_copy_to_nchw():
    unet = make_unet(False, torch.float64).to(memory_format=torch.channels_last)
    module = next(m for m in unet.modules() if isinstance(m, Upsample2D))
    x = torch.randn(64, module.channels, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    layouts, results = [], []
    module.conv.register_forward_pre_hook(
        lambda conv, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    for patched in (False, True):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        if patched:
            assert patch(unet).counts["Upsample2D"] == 1
        out = module(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    assert layouts == [False, True]
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(module(x, output_size=(6, 10)), module(x)), "a size of its own takes diffusers' way"

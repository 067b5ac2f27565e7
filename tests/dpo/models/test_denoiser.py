"""dpo.models.denoiser: halved weights give autocast's own bits; checkpointing per block; attention that is not there."""

import copy
import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from dpo.common.errors import UserError
from dpo.models import denoiser as unet_module
from dpo.models import lora
from dpo.models.denoiser import fix_projections, halve, use_attention, use_checkpointing
from tests.help.worlds import KINDS, make_pipeline


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> dict[str, UNet2DConditionModel]:
    root = tmp_path_factory.mktemp("unets")
    made = {
        kind: UNet2DConditionModel.from_pretrained(
            make_pipeline(root / kind, kind) / "unet", use_safetensors=True
        ).eval()
        for kind in KINDS
    }
    for unet in made.values():
        fix_projections(unet)
    return made


def arguments(unet: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=generator, dtype=dtype)
    text = torch.randn(4, 77, unet.config.cross_attention_dim, generator=generator, dtype=dtype)
    kwargs = {"encoder_hidden_states": text, "return_dict": False}
    if unet.config.addition_embed_type:
        micro = torch.tensor([[32, 32, 0, 0, 32, 32]] * 4).to(dtype)
        kwargs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(4, 24, generator=generator, dtype=dtype),
            "time_ids": micro,
        }
    return (x, torch.tensor([10, 500, 10, 500])), kwargs


def run(unet: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> torch.Tensor:
    args, kwargs = arguments(unet)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return unet(*args, **kwargs)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_halved_copy_gives_autocasts_bits(unets, kind, dtype):
    policy = copy.deepcopy(unets[kind]).requires_grad_(True)
    twin = halve(copy.deepcopy(unets[kind]).requires_grad_(False), dtype)
    with torch.no_grad():
        reference = run(twin, dtype)
    assert torch.equal(run(policy, dtype), reference)
    kinds = {
        type(m): {p.dtype for p in m.parameters(recurse=False)}
        for m in twin.modules()
        if list(m.parameters(recurse=False))
    }
    assert kinds[nn.Linear] == kinds[nn.Conv2d] == {dtype}
    assert kinds[nn.GroupNorm] == kinds[nn.LayerNorm] == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_projections_get_contiguous_inputs(unets, kind):
    """Whether a strided input changes a bit depends on the processor; that it is never strided does not."""
    unet, seen = copy.deepcopy(unets[kind]), []
    for block in unet.modules():
        if isinstance(block, Transformer2DModel) and block.use_linear_projection:
            block.proj_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.no_grad():
        run(unet)
    assert all(seen) and bool(seen) == (kind in ("sd2v", "sdxl", "sdxl-turbo"))


def test_halving_everything_would_not(unets):
    """Why norms stay wide: a plain half-precision copy is off, so the test above can fail."""
    plain = copy.deepcopy(unets["sd15"]).requires_grad_(False)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        right, wrong = halve(copy.deepcopy(plain), torch.bfloat16), copy.deepcopy(plain).bfloat16()
        args, kwargs = arguments(plain)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wrong_out = wrong(
                args[0].bfloat16(), args[1], encoder_hidden_states=kwargs["encoder_hidden_states"].bfloat16()
            )[0]
        assert torch.equal(run(plain), run(right)) and not torch.equal(run(plain).float(), wrong_out.float())


def test_what_is_trained_is_not_halved(unets):
    unet = copy.deepcopy(unets["sd15"])
    lora.add(unet, rank=2, alpha=2, target_modules=("to_q",), dropout=0.0, seed=0)
    halve(unet, torch.bfloat16)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad is ("lora" in name)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
    assert unet.conv_in.weight.dtype == torch.bfloat16


# --- gradient checkpointing ---------------------------------------------------------------------------------------------


def recomputed(unet: nn.Module) -> set[str]:
    """Blocks that recompute their activations."""
    return {name for name, module in unet.named_modules() if getattr(module, "gradient_checkpointing", False)}


@pytest.mark.parametrize(
    ("setting", "blocks"),
    [
        ("off", set()),
        ("on", {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}),
        ("mid_block", {"mid_block"}),
        ("down_blocks.0, up_blocks.1", {"down_blocks.0", "up_blocks.1"}),
    ],
)
def test_checkpointing_of_named_blocks(unets, setting, blocks):
    unet = copy.deepcopy(unets["sd15"]).train()
    use_checkpointing(unet, "on")  # the setting replaces whatever was before
    use_checkpointing(unet, setting)
    assert {name for name in recomputed(unet) if name.count(".") <= 1 and name} == blocks
    inside = {".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in recomputed(unet)}
    assert inside == blocks


@pytest.mark.parametrize("setting", ["on", "down_blocks.0,mid_block"])
def test_checkpointing_changes_no_bit_and_does_recompute(unets, setting, monkeypatch):
    plain, saving = copy.deepcopy(unets["sd15"]).train(), copy.deepcopy(unets["sd15"]).train()
    use_checkpointing(saving, setting)
    calls = {}
    for label, unet in (("plain", plain), ("saving", saving)):
        calls[label] = 0

        def count(*_, label=label):
            calls[label] += 1

        unet.down_blocks[0].resnets[0].norm1.register_forward_hook(count)
    outputs = [run(plain, None)]
    with monkeypatch.context() as patch:  # a CUDA graph could not capture that the generator's state is read
        patch.setattr(torch, "get_rng_state", lambda: pytest.fail("the state of a generator was read"))
        outputs.append(run(saving, None))
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert calls == {"plain": 1, "saving": 2}


def test_unknown_block_is_one_line_that_names_those_there(unets):
    with pytest.raises(
        UserError, match=r"no such block: down_blocks.7; the UNet has .*down_blocks.1.*mid_block"
    ) as caught:
        use_checkpointing(copy.deepcopy(unets["sd15"]), "mid_block,down_blocks.7")
    assert "\n" not in str(caught.value)


# --- attention ------------------------------------------------------------------------------------------------------------


def test_xformers_that_is_missing_is_one_warning(unets, monkeypatch, caplog):
    monkeypatch.setattr(unet_module, "find_spec", lambda name: None)
    before = run(unets["sd15"], None)
    with caplog.at_level(logging.WARNING, "dpo"):
        use_attention(unets["sd15"], "xformers", torch.device("cpu"), torch.float32)
    (record,) = caplog.records
    assert "pip install xformers" in record.getMessage() and "\n" not in record.getMessage()
    assert torch.equal(run(unets["sd15"], None), before)
    caplog.clear()
    use_attention(unets["sd15"], "sdpa", torch.device("cpu"), torch.float32)
    assert caplog.records == []


@pytest.mark.parametrize("gpu", [True, False])
def test_xformers_that_is_there_is_used_on_a_gpu(gpu, monkeypatch, caplog):
    monkeypatch.setattr(unet_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    asked = []

    class Unet(nn.Module):
        config, attn_processors, set_attn_processor = {"down_block_types": ()}, {}, lambda self, processors: None

        def enable_xformers_memory_efficient_attention(self):
            asked.append(True)

    use_attention(Unet(), "xformers", torch.device("cpu"), torch.float32)
    assert asked == [True] * gpu
    assert ("needs a GPU" in caplog.text) is not gpu

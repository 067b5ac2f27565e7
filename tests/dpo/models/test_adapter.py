"""dpo.models.adapter: what a LoRA adds, merged, joined and widened, against plain matrices in float64."""

import pytest
import torch

from dpo.models.adapter import Adapter, Factors, endings, even, joined, kohya, merge_into, peft


def factors(rank: int, alpha: float, shape: tuple[int, ...], seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return Factors(torch.randn(rank, *shape[1:], generator=generator), up, alpha)


def added(one: Factors) -> torch.Tensor:
    """alpha / r * sum over r of up[:, r] x down[r], in float64."""
    product = torch.einsum("or,r...->o...", one.up.double().flatten(1), one.down.double())
    return product * one.alpha / len(one.down)


LINEAR, CONV = (6, 5), (4, 3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merging_adds_to_the_weights_and_to_nothing_else(dtype):
    module = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(5, 6), "b": torch.nn.Conv2d(3, 4, 3), "c": torch.nn.Linear(2, 2)}
    )
    module.to(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    adapter = {"a": factors(2, 3.0, LINEAR), "b": factors(3, 1.5, CONV, 1)}
    merge_into(module, adapter)
    for name, value in module.state_dict().items():
        layer, _, part = name.partition(".")
        more = added(adapter[layer]) if layer in adapter and part == "weight" else 0.0
        wanted = before[name].double() + more
        torch.testing.assert_close(value, wanted.to(dtype))
        assert layer == "c" or part == "bias" or not torch.equal(value, before[name])


def test_joined_adapters_add_what_both_add_at_one_rank():
    first: Adapter = {"a": factors(2, 3.0, LINEAR), "b": factors(4, 4.0, CONV, 1)}
    second: Adapter = {"a": factors(3, 1.5, LINEAR, 2), "c": factors(1, 8.0, LINEAR, 3)}
    both = joined(first, second)
    assert {name: (one.rank, one.alpha) for name, one in both.items()} == dict.fromkeys("abc", (5, 5.0))
    for name, one in both.items():
        wanted = sum(added(adapter[name]) for adapter in (first, second) if name in adapter)
        torch.testing.assert_close(added(one), wanted, rtol=1e-6, atol=1e-6)
        assert one.up.shape[1] == 5 and one.up.dim() == one.down.dim()


def test_both_layouts_carry_the_scale():
    adapter = {"down.a": factors(2, 3.0, LINEAR)}
    plain, named = peft(adapter), kohya(adapter, lambda name: f"up.{name}")
    assert set(plain) == {"down.a.lora_A.weight", "down.a.lora_B.weight"}
    torch.testing.assert_close(
        plain["down.a.lora_B.weight"] @ plain["down.a.lora_A.weight"], added(adapter["down.a"]).float()
    )
    stem = "lora_unet_up_down_a"
    assert set(named) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert named[f"{stem}.alpha"] == 3.0 and torch.equal(named[f"{stem}.lora_up.weight"], adapter["down.a"].up)


def test_layers_are_named_by_what_they_alone_have():
    block = "up.0.attentions.0"
    modules = [
        block,
        f"{block}.to_q",
        f"{block}.to_k",
        f"{block}.to_out",
        f"{block}.to_out.0",
        f"{block}.ff.net.0",
        "to",
    ]
    others = ["down.0.attentions.0.to_q", "conv_in"]
    assert endings([f"{block}.to_k", f"{block}.to_out.0", "conv_in"], modules + others) == (
        "to_k",
        "to_out.0",
        "conv_in",
    )
    assert endings([f"{block}.to_q"], modules + others) == (f"{block}.to_q",)  # the other to_q is not meant
    assert endings([f"{block}.to_q", others[0]], modules + others) == ("to_q",)


def test_uneven_layers_are_widened_and_even_ones_are_left():
    one, two = factors(2, 3.0, LINEAR), factors(4, 4.0, LINEAR, 1)
    assert even({"a": one, "b": one}) == {"a": one, "b": one}
    found = even({"a": one, "b": two})
    assert {(f.rank, f.alpha) for f in found.values()} == {(4, 4.0)} and torch.equal(found["b"].up, two.up)
    torch.testing.assert_close(added(found["a"]), added(one), rtol=1e-6, atol=1e-6)


def test_a_scale_of_one_changes_no_bit():
    one = factors(2, 2.0, LINEAR)
    assert torch.equal(one.baked().up, one.up) and torch.equal(one.baked().down, one.down)

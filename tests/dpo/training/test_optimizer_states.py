"""Every optimizer goes on exactly from its saved state: moments, quantised states, nested entries."""

import json

import pytest
import torch

from dpo.training import optimizer
from dpo.training.checkpoint import copy_into, load, load_optimizer, pack, save, unpack


def model() -> torch.nn.Sequential:
    """Large enough (4096 elements a tensor and more) for the 8-bit optimizers to quantise; fp32 weights."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64), torch.nn.LayerNorm(64)
    )


def train(net: torch.nn.Module, made: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        for group in made.param_groups:
            group["lr"] = optimizer.learning_rate(step, peak=3e-3, warmup=3, steps=20, scheduler="cosine")
        net(x).sub(x.roll(1, 1)).square().mean().backward()
        made.step()
        made.zero_grad()


def build(kind: str, net: torch.nn.Module, **others) -> torch.optim.Optimizer:
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2} | others
    return optimizer.build(kind, list(net.parameters()), **settings)


KINDS = ["adamw", "adamw8bit", "bnb-adamw8bit", "paged-adamw8bit", "lion8bit", "adafactor"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_on_resume_holds(kind):
    """All that the settings say may change: the next update is that of the new values, and the next checkpoint has them."""
    changed = {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5}
    net = model()
    made = build(kind, net)
    train(net, made, 0, 3)
    tensors, rest = pack(made.state_dict())
    ends = []
    for settings in ({}, changed):
        again = model()
        copy_into(dict(again.named_parameters()), {name: value.detach() for name, value in net.named_parameters()}, "")
        resumed = build(kind, again, **settings)
        built = [{**group, "params": None} for group in resumed.param_groups]
        load_optimizer(resumed, tensors, json.loads(json.dumps(rest)))
        assert [{**group, "params": None} for group in resumed.param_groups] == built
        train(again, resumed, 3, 4)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in again.parameters()]))
    assert not torch.equal(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_k_steps_save_load_k_steps_equal_2k_steps(tmp_path, kind):
    whole = model()
    made = build(kind, whole)
    train(whole, made, 0, 12)

    first = model()
    half = build(kind, first)
    train(first, half, 0, 6)
    tensors, rest = pack(half.state_dict())
    path = save(
        tmp_path / "step-00000006",
        {"policy": dict(first.named_parameters()), "optimizer": tensors},
        {"optimizer": rest},
    )
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}

    found = load(path)
    second = model()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.normal_()  # so that only the checkpoint can bring the weights back
    resumed = build(kind, second)
    copy_into(dict(second.named_parameters()), found.tensors["policy"], "policy")
    load_optimizer(resumed, found.tensors["optimizer"], found.state["optimizer"])
    train(second, resumed, 6, 12)
    for one, two in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    a, b = pack(made.state_dict())[0], pack(resumed.state_dict())[0]
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    if kind == "adamw8bit":
        assert any(value.dtype == torch.uint8 for value in a.values())  # it really is the 8-bit state
    started = model()
    assert not torch.equal(next(iter(whole.parameters())), next(iter(started.parameters())))


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw8bit", "bnb-adamw8bit"])
def test_wide_state_of_half_precision_weights_is_not_rounded(kind):
    net, again = model().bfloat16(), model().bfloat16()
    made, fresh = build(kind, net), build(kind, again)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    made.step()
    tensors, rest = pack(made.state_dict())
    load_optimizer(fresh, tensors, json.loads(json.dumps(rest)))
    loaded = pack(fresh.state_dict())[0]
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


def test_a_lost_optimizer_state_would_show():
    """The test above can fail: without the state, the second half goes elsewhere."""
    whole, broken = model(), model()
    train(whole, build("adamw", whole), 0, 12)
    train(broken, build("adamw", broken), 0, 6)
    train(broken, build("adamw", broken), 6, 12)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_pack_is_json_beside_tensors():
    net = model()
    made = build("adafactor", net)
    train(net, made, 0, 2)
    tensors, rest = pack(made.state_dict())
    again = unpack(tensors, json.loads(json.dumps(rest)))
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    state = made.state_dict()["state"]
    assert set(again["state"]) == set(state)
    for index, entry in state.items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(again["state"][index][key], value)
            elif value is not None:
                assert again["state"][index][key] == value

"""FSDP2 on two or four processes: gradients, norms, whole tensors and optimizer states are those of one process."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from csrc_triton.adamw8bit import AdamW8bit
from dpo.common.errors import UserError
from dpo.models.denoiser import halve
from dpo.models.load import load
from dpo.models.ready import settle
from dpo.settings.config import Runtime
from dpo.training import sharding
from tests.help.processes import together
from tests.help.worlds import make_pipeline

CPU = torch.device("cpu")
KINDS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unets")
    found = {kind: load(str(make_pipeline(folder / kind, kind))).denoiser.eval() for kind in KINDS}
    wide = {**found["sd15"].config, "block_out_channels": (32, 64)}  # whose halves end at the ends of blocks of 256
    wide |= {"in_channels": 15}  # but for those of conv_in: 4320 weights
    return found | {"wide": type(found["sd15"]).from_config(wide).eval()}


def settled(unet, **runtime):
    unet = copy.deepcopy(unet)
    return settle(Runtime(**{"kernels": "torch", "channels_last": "off", "checkpointing": "off"} | runtime), unet, CPU)


def joined(count, work, folder):
    """What `work` returns in each of `count` processes that have joined for collectives."""

    def one(processes):
        processes.join(CPU)
        return work()

    return together(count, one, folder)


def inputs(unet, rows, dtype=torch.float64):
    """What the UNet is called with, for these rows of a batch of 4."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, unet.config.in_channels, 8, 8, generator=g)[rows].to(dtype)
    text = torch.randn(4, 7, unet.config.cross_attention_dim, generator=g)[rows].to(dtype)
    t = torch.tensor([3, 500, 20, 999])[rows]
    more = {}
    if unet.config.addition_embed_type:
        pooled = torch.randn(4, 24, generator=g)[rows].to(dtype)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.ones(4, 6)[rows].to(dtype)}}
    return (x, t), {"encoder_hidden_states": text, "return_dict": False, **more}


def backward(unet, micro_batches, collect=lambda: None):
    for rows in micro_batches:
        args, more = inputs(unet, rows)
        (unet(*args, **more)[0].square().sum() / 4).backward()
        collect()


def gradients(unet, count, blocks_of_states=False, **runtime):
    """Whole gradients and their norm from `count` processes, each with its share of four micro-batches of one row."""
    unet = settled(unet, **runtime).double().requires_grad_(True)
    own = list(range(dist.get_rank(), 4, count))
    shards = sharding.Shards(unet, CPU, blocks_of_states=blocks_of_states)
    backward(unet, [[row] for row in own], shards.collect)
    shards.reduce()
    norms = [p.grad.norm() for p in shards.parameters]
    return dict(shards.whole(p.grad for p in shards.parameters)), shards.norm(norms)


def one_process(unet, blocks_of_states=False, **runtime):
    unet = settled(unet, **runtime).double().requires_grad_(True)
    backward(unet, [[0, 1, 2, 3]])
    found = {name: p.grad for name, p in unet.named_parameters()}
    return found, torch.stack([grad.norm() for grad in found.values()]).norm()


CASES = {  # UNet, then settings of the run
    "checkpointed": ("sdxl", {"checkpointing": "on"}),
    "conv_in whole": ("wide", {"channels_last": "on", "blocks_of_states": True}),
}


def step_zero(unet, **runtime):
    """The policy's prediction, with gradient and without, and that of its frozen twin, under bf16 autocast."""
    policy, twin = settled(unet, **runtime).requires_grad_(True), settled(unet, **runtime).requires_grad_(False)
    halve(twin, torch.bfloat16)
    for one in (policy, twin):
        sharding.Shards(one, CPU)
    args, more = inputs(unet, [0, 1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = [policy(*args, **more)[0].detach()]
        with torch.no_grad():
            return found + [one(*args, **more)[0] for one in (policy, twin)]


def round_trip(unet, dtype, **runtime):
    """Whole weights and states after three updates, from shards with given gradients; then the same from what was put back."""
    unet = settled(unet, **runtime).to(dtype).requires_grad_(True)
    names = [name for name, _ in unet.named_parameters()]
    whole = {name: p.detach().clone(memory_format=torch.preserve_format) for name, p in unet.named_parameters()}
    shards = sharding.Shards(unet, CPU, blocks_of_states=True)
    assert [rows.name for rows in shards.rows if rows.repeated] == ["conv_in.weight"]
    kept = dict(shards.whole(shards.parameters))
    assert all(torch.equal(kept[name], whole[name]) for name in kept)
    eight = AdamW8bit(shards.parameters, lr=1e-2, seed=3, parts=shards.parts)
    adam = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in shards.parameters], lr=1e-2, fused=True)
    for seed in range(3):
        grads = list(shards.put(given(whole, seed)).values())
        for optimizer in (eight, adam):
            for p, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    states = [shards.state_dict(optimizer) for optimizer in (eight, adam)]
    weights = dict(shards.whole(shards.parameters))
    args, more = inputs(unet, [0], dtype)
    with torch.no_grad():  # the modules see what the optimizer wrote
        said = unet(*args, **more)[0]
        if kept:
            assert list(weights) == names
            assert torch.equal(said, shards.alone(weights)(*args, **more)[0])
    return weights, states


def given(whole, seed):
    """Gradients of whole parameters, in their memory order."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty_like(p).copy_(torch.randn(p.shape, generator=g, dtype=torch.float32))
        for name, p in whole.items()
    }


def alone(unet, dtype, **runtime):
    """As `round_trip`, in one process without shards."""
    unet = settled(unet, **runtime).to(dtype).requires_grad_(True)
    whole = dict(unet.named_parameters())
    eight = AdamW8bit(whole.values(), lr=1e-2, seed=3)
    adam = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in whole.values()], lr=1e-2, fused=True)
    for seed in range(3):
        for optimizer in (eight, adam):
            for p, grad in zip(optimizer.param_groups[0]["params"], given(whole, seed).values(), strict=True):
                p.grad = grad
            optimizer.step()
    return {name: p.detach() for name, p in whole.items()}, [eight.state_dict(), adam.state_dict()]


def without_growth(unet):
    """Lengths of torch's list of blocks that ran, after one pass without gradient and after many."""
    unet = settled(unet).requires_grad_(False)
    shards = sharding.Shards(unet, CPU)
    args, more = inputs(unet, [0], torch.float32)
    lengths = []
    for _ in range(3):
        with torch.no_grad():
            unet(*args, **more)
        shards.forget()
        group = next(sharding.groups(unet))
        lengths.append((len(group.comm_ctx.post_forward_order), len(group._post_forward_indices)))
    return lengths


def cut(unet, blocks_of_states):
    """The share of the weights that this process holds, and the weights of each group that is gathered, the root's first."""
    shards = sharding.Shards(settled(unet), CPU, blocks_of_states=blocks_of_states)
    sizes = [sum(p._orig_size.numel() for p in group.fsdp_params) for group in sharding.groups(shards.module)]
    return shards.share(), sizes


@pytest.fixture(scope="module")
def two(unets, tmp_path_factory):
    """What two processes find, all in one launch."""

    def work():
        return {
            "gradients": {name: gradients(unets[kind], 2, **runtime) for name, (kind, runtime) in CASES.items()},
            "step zero": step_zero(unets["sdxl"]),
            "round trip": round_trip(unets["wide"], torch.bfloat16, channels_last="on"),
            "growth": without_growth(unets["sd15"]),
            "cut": [cut(unets["wide"], blocks_of_states) for blocks_of_states in (False, True)],
        }

    return joined(2, work, tmp_path_factory.mktemp("two"))


def agrees(found, wanted):
    (grads, norm), (expected, size) = found, wanted
    assert list(grads) == list(expected)
    assert all((grads[name] - grad).norm() <= 1e-10 * size for name, grad in expected.items())
    assert abs(norm - size) <= 1e-10 * size


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_summed(unets, two, case):
    kind, runtime = CASES[case]
    agrees(two[0]["gradients"][case], one_process(unets[kind], **runtime))
    assert not two[1]["gradients"][case][0]  # the others keep no whole tensor


@pytest.mark.slow
def test_gradients_of_four_processes(unets, tmp_path):
    found = joined(4, lambda: gradients(unets["sd15"], 4), tmp_path)
    agrees(found[0], one_process(unets["sd15"]))


def test_step_zero_is_exact_under_autocast(two):
    for found in two:
        assert all(torch.equal(a, b) for a, b in pairwise(found["step zero"]))


@pytest.mark.long
def test_updates_and_states_have_the_bits_of_one_process(unets, two):
    weights, states = alone(unets["wide"], torch.bfloat16, channels_last="on")
    found, kept = two[0]["round trip"]
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert kept[0]["state"].keys() == states[0]["state"].keys()
    assert all(torch.equal(kept[0]["state"][name], value) for name, value in states[0]["state"].items())
    for index, entry in states[1]["state"].items():
        assert entry.keys() == kept[1]["state"][index].keys()
        assert all(torch.equal(kept[1]["state"][index][key], value) for key, value in entry.items())


def test_passes_without_gradient_leave_nothing(two):
    assert two[0]["growth"] == [(0, 0)] * 3


def test_a_plan_knows_what_the_first_process_holds_and_what_is_gathered(unets, two):
    """Without a second process: from shapes alone."""
    for blocks_of_states, (share, _), (other, _) in zip((False, True), two[0]["cut"], two[1]["cut"], strict=True):
        assert sharding.first_share(unets["wide"], 2, blocks_of_states=blocks_of_states) == share >= other > 0.4
    around, *blocks = two[0]["cut"][0][1]
    assert sharding.largest_block(unets["wide"]) == (max(blocks), around) and len(blocks) > 5


def test_process_counts_that_cut_blocks_are_refused(unets):
    sharding.check_blocks(unets["wide"], 2)
    with pytest.raises(UserError, match="3 processes would cut .*; start 2, 4 processes, or"):
        sharding.check_blocks(unets["wide"], 3)
    with pytest.raises(UserError, match="no number of processes fits"):
        sharding.check_blocks(nn.Linear(100, 63), 2)

"""Training steps of rectified flow at 1024 px, LoRA on random weights: step 0, then one timed row for each family.

The models are those of the shipped configs, settings are decided and the step is made by the trainer's own functions.
Captions and latents are given, as from a prepared store; the reference is live.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Check
from benchmarks.step_zero import at_start
from benchmarks.steps import Setting, forget_peak, measured, not_tried, our_step, share_of_peak
from dpo import reference
from dpo.encode import Inputs
from dpo.models.family import Model, TextEncoding
from dpo.models.ready import HALF, decide, settle
from dpo.planning.cuda import GIB, unseen
from dpo.planning.sketch import sketch
from dpo.settings.flags import parse
from dpo.settings.resolve import DeviceFacts
from dpo.step import PairStep
from dpo.training import denoisers, flops


@dataclass(frozen=True)
class Flow:
    """A family's row. held, each: GiB at the peak that all pairs share, and that each pair adds, by a plan.

    small: changes of the transformer's config with which the same code runs on a CPU in a second.
    """

    name: str
    model: str  # a hub id with shipped configs
    held: float
    each: float
    pairs: int = 4
    small: Mapping[str, Any] = field(default_factory=dict)


FLOWS = (
    Flow(
        "SD 3.5 medium", "stabilityai/stable-diffusion-3.5-medium", 5.08, 1.45,
        small={
            "num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64, "dual_attention_layers": (0,),
            "joint_attention_dim": 32, "pooled_projection_dim": 16,
        },
    ),
    Flow(
        "FLUX.2 klein base 4B", "black-forest-labs/FLUX.2-klein-base-4B", 7.31, 3.55, 2,  # at 400 TFLOP/s a step takes 1.4 s
        small={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32},
    ),
)  # fmt: skip
RANK = 16
SETTING = Setting("ours: prepared, live reference, kernels, LoRA, checkpointing", low_rank=True, checkpointing=True)


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    """A family after the other; one that cannot fit is not tried."""
    flows = [replace(flow, name=f"small {flow.name}", pairs=1) for flow in FLOWS] if smoke else FLOWS
    return [Check(flow.name, partial(rows, flow, device, smoke), 60) for flow in flows]


def flags(flow: Flow, device: torch.device, smoke: bool) -> list[str]:
    """What such a run is asked for with; fp32 on a CPU, where half precision is emulated."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    asked = f"--lora --rank {RANK} --data-format store --checkpointing on --precision {precision} --device {device}"
    return [*asked.split(), "--model", flow.model, "--batch-size", str(flow.pairs), *["--resolution", "64"] * smoke]


def needed(flow: Flow) -> int:
    """Bytes at the peak of a step, estimated."""
    total = round((flow.held + flow.pairs * flow.each) * GIB)
    return total + sum(unseen(total).values())


def step_of(flow: Flow, device: torch.device, smoke: bool) -> tuple[PairStep, Inputs, Tensor]:
    """The trainer's own forward on synthetic prepared inputs, ready to be called."""
    config, _ = parse(flags(flow, device, smoke), with_pairs=False)
    model = sketch(config.model)
    torch.manual_seed(0)
    shape = dict(model.denoiser.config) | (dict(flow.small) if smoke else {})
    with torch.device(device):
        model.denoiser = type(model.denoiser).from_config(shape).requires_grad_(False).eval()
    config, plan, _ = decide(config, model, DeviceFacts(str(device)))
    layers = denoisers.make_policy(config, model.denoiser, None)
    policy = model.denoise(settle(config.runtime, model.denoiser, device))
    step, _ = denoisers.pair_step(config, model, plan, policy, reference.from_adapters(policy, layers), device)
    side = config.data.resolution
    assert side is not None, "decided"
    return step, inputs_of(flow, model, side // model.geometry.vae_scale, device), torch.zeros_like(step.weight)


def inputs_of(flow: Flow, model: Model, side: int, device: torch.device) -> Inputs:
    """What a prepared store gives: posterior mean and std, encoded captions."""
    assert model.family.flow is not None
    index = torch.arange(flow.pairs, device=device)
    mean = torch.randn(2 * flow.pairs, model.geometry.channels, side, side, device=device)
    half = HALF["bf16"] if device.type == "cuda" else torch.float32
    blank = model.family.flow.blank(model)
    text = TextEncoding(
        *(None if x is None else torch.randn(flow.pairs, *x.shape[1:], device=device).to(half) for x in blank)  # type: ignore[arg-type]
    )
    one = torch.ones(flow.pairs, device=device)
    return Inputs(index + 1, torch.zeros_like(index), one, one.clone(), mean, torch.full_like(mean, 0.05), text, None)


def rows(flow: Flow, device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Step 0, then the time of a micro-step and of an update."""
    row: dict[str, Any] = {"model": flow.name, "setting": SETTING.name, "pairs": flow.pairs}
    row["GiB, estimated"] = needed(flow) / GIB
    if (why := not_tried(needed(flow), device)) is not None:
        yield row | {"failed": why}
        return
    made = step_of(flow, device, smoke)
    yield {"model": flow.name} | at_start(f"largest logit at step 0, {flow.name}, LoRA", made)
    forget_peak(device)
    model, latents = made[0].model, made[1].latent_mean
    parameters: list[Tensor] = [p for p in model.denoiser.parameters() if p.requires_grad]
    budget = 0.0 if smoke else 0.7
    row |= measured(our_step(made, SETTING), parameters, SETTING.optimizer, flow.pairs, device, budget)
    forward = flops.forward_flops(model, *latents.shape[2:])
    yield row | share_of_peak(flops.pair_flops(forward, trainable="lora"), row["pairs/s"], device)

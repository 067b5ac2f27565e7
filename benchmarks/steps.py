"""Training steps of full-size UNets with random weights: ours, one thing at a time, the peers' beside it, and a profile.

Each row stands beside its bounds (counted FLOPs over the card's peak, counted bytes over its copy bandwidth) and, where
there is one, the figure that was predicted for an H100 before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checks import Check, Row
from benchmarks.measuring import captured, copy_bandwidth, median_seconds
from benchmarks.peers import TARGETS, peers_step
from benchmarks.sizes import SD15, SDXL, Size, make_unet, small_model
from dpo import reference
from dpo.encode import Inputs
from dpo.models import lora
from dpo.models.denoiser import halve
from dpo.models.family import Model, TextEncoding, families
from dpo.models.ready import HALF, settle
from dpo.planning.cuda import GIB, unseen
from dpo.schedule import Schedule, noise_path
from dpo.settings.config import Runtime
from dpo.step import PairStep
from dpo.training import flops, optimizer
from dpo.training.deterministic import make_deterministic

EFFECTIVE = 2048  # pairs an update, over which the optimizer's time is spread
STATES = {"adamw": 8, "adamw8bit": 2.04, "adafactor": 0.1}  # bytes of the optimizer for each parameter
RECOMPUTED = 0.15  # share of the activations that stay under checkpointing
OUTSIDE = "outside the UNet"
bandwidth = cache(copy_bandwidth)


@dataclass(frozen=True)
class Setting:
    """One row: everything that is switched on."""

    name: str
    pairs: int = 1
    precision: str = "bf16"
    checkpointing: bool = False
    channels_last: bool = False
    kernels: bool = False
    compiled: bool = False
    graph: bool = False
    recorded: bool = False
    low_rank: bool = False
    optimizer: str = "adamw8bit"
    deterministic: bool = False  # for the whole process


def ladder(model: Size) -> Iterator[Setting]:
    """Ours, what counts most first."""
    first = Setting(
        "ours: prepared, recorded reference, kernels", model.pairs[0], channels_last=True, kernels=True, recorded=True
    )
    yield first
    for pairs in model.pairs[1:]:
        yield replace(first, pairs=pairs)
    yield replace(first, name="live reference", recorded=False)
    yield replace(first, name="CUDA graph", graph=True)
    yield replace(first, name="without kernels", kernels=False)
    yield replace(first, name="LoRA", low_rank=True)
    yield replace(first, name="checkpointing", checkpointing=True)
    yield replace(first, name="NCHW, without kernels", channels_last=False, kernels=False)
    yield replace(first, name="fp32 states of AdamW", optimizer="adamw")
    yield replace(first, name="deterministic", deterministic=True)


def compiled_settings(model: Size) -> Iterator[Setting]:
    first = next(ladder(model))
    yield replace(first, name="compile", compiled=True)
    yield replace(first, name="compile without kernels", compiled=True, kernels=False)
    yield replace(first, name="compile, LoRA", compiled=True, low_rank=True)


def sizes(smoke: bool) -> tuple[Size, ...]:
    return (small_model(),) if smoke else (SD15, SDXL)


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    """Ours and the peers' in turn: the headline of each model before anything else."""
    budget = 0.01 if smoke else 0.7
    turns = []
    for model in sizes(smoke):
        own = [_check(model, setting, device, budget) for setting in ladder(model)]
        turns.append([own[0], _peers_check(model, False, device, budget, 45), *own[1:]])
    return [turn[i] for i in range(max(map(len, turns))) for turn in turns if i < len(turn)]


def compiled_checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    """Each in a process of its own: a compiler's cache and its faults stay there."""
    every = [list(compiled_settings(model)) for model in sizes(smoke)]
    found = []
    for settings in zip(*every):
        for model, setting in zip(sizes(smoke), settings):
            found.append(replace(_check(model, setting, device, 0.01 if smoke else 0.7, 120), alone=True))
    return found[:1] if smoke else found


def peers_checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    """The peers' step with full time, all weights and LoRA."""
    budget = 0.01 if smoke else 10.0
    return [_peers_check(model, low_rank, device, budget, 130) for model in sizes(smoke) for low_rank in (False, True)]


def profile_checks(device: torch.device, smoke: bool, seconds: float, measured: Sequence[Row]) -> list[Check]:
    """The fastest row of each model. measured: the rows of `checks`."""
    found = []
    for model in sizes(smoke):
        setting = fastest(model, measured)
        name = f"profile, {model.name}: {setting.name}, {setting.pairs} pairs"
        found.append(Check(name, lambda m=model, s=setting: profile(m, s, device), 40, alone=setting.deterministic))
    return found


def fastest(model: Size, measured: Sequence[Row]) -> Setting:
    """The setting of most pairs/s among rows of the ladder that train all weights; the headline where none was measured.

    LoRA is another job: it is no way to train the same weights faster.
    """
    rates = {(row.get("setting"), row.get("pairs")): row["pairs/s"] for row in measured if is_timed(row, model)}
    every = [setting for setting in ladder(model) if not setting.low_rank]
    return max(every, key=lambda setting: rates.get((setting.name, setting.pairs), 0.0))


def is_timed(row: Row, model: Size) -> bool:
    return row.get("model") == model.name and bool(row.get("pairs/s"))


def _check(model: Size, setting: Setting, device: torch.device, budget: float, limit: float = 45) -> Check:
    name = f"{model.name}: {setting.name}, {setting.pairs} pairs"
    return Check(name, lambda: ours(model, setting, device, budget), limit, alone=setting.deterministic)


def _peers_check(model: Size, low_rank: bool, device: torch.device, budget: float, limit: float) -> Check:
    name = f"{model.name}: the peers' step, {'LoRA' if low_rank else 'all weights'}"
    return Check(name, lambda: peers(model, low_rank, device, budget), limit)


def step_of(model: Size, setting: Setting, device: torch.device) -> tuple[PairStep, Inputs, Tensor]:
    """The trainer's own forward on synthetic prepared inputs, ready to be called."""
    half = HALF.get(runtime_of(setting, device).precision)
    unet = make_unet(model, device)
    layers: list[nn.Module] = []
    if setting.low_rank:
        layers = lora.add(unet, rank=8, alpha=8.0, target_modules=TARGETS, dropout=0.0, seed=0)
        if half is not None:
            halve(unet, half)
        unet.to(device)
    else:
        unet.requires_grad_(True)
    twin = None if setting.recorded or setting.low_rank else reference.frozen(unet, half)
    vae = SimpleNamespace(config={"scaling_factor": 0.18215, "latent_channels": 4})
    parts = Model(families()[model.family], unet, vae, [], [], {}, model.name, None)
    used = [
        parts.denoise(settle(runtime_of(setting, device), module, device))
        for module in (unet, twin)
        if module is not None
    ]
    compared = reference.from_copy(used[1]) if twin is not None else None
    if setting.low_rank and not setting.recorded:
        compared = reference.from_adapters(used[0], layers)
    shift, scale = (torch.tensor(values, device=device) for values in parts.family.scaling(parts.vae))
    step = PairStep(
        model=parts,
        policy=used[0],
        reference=compared,
        path=noise_path(
            Schedule(torch.linspace(0.999, 0.005, 1000), "epsilon"), torch.arange(1000), torch.float32, device
        ),
        weight=torch.ones(1000, device=device),
        beta=torch.tensor(2000.0, device=device),
        seed=torch.tensor(0, device=device),
        scaling=(shift, scale),
        autocast=half,
        dtype=torch.float32,
    )
    return step, inputs_of(model, setting, device, half), torch.zeros(1000, device=device)


def runtime_of(setting: Setting, device: torch.device) -> Runtime:
    """The trainer's own settings of a denoiser. fp32 on a CPU, where half precision is emulated."""
    return Runtime(
        precision=setting.precision if device.type == "cuda" else "fp32",
        channels_last="on" if setting.channels_last else "off",
        kernels="triton" if setting.kernels and device.type == "cuda" else "torch",
        checkpointing="on" if setting.checkpointing else "off",
        compile=setting.compiled,
        attention="sdpa",
    )


def inputs_of(model: Size, setting: Setting, device: torch.device, half: torch.dtype | None) -> Inputs:
    """What a prepared store gives: posterior mean and std, encoded captions."""
    pairs, side = setting.pairs, model.unet["sample_size"]
    index = torch.arange(pairs, device=device)
    dtype = half or torch.float32
    mean = torch.randn(2 * pairs, 4, side, side, device=device)
    text = TextEncoding(
        torch.randn(pairs, *model.text, device=device).to(dtype),
        None if model.pooled is None else torch.randn(pairs, model.pooled, device=device).to(dtype),
    )
    micro = torch.tensor([8 * side, 8 * side, 0, 0, 8 * side, 8 * side], device=device).repeat(2 * pairs, 1)
    one = torch.ones(pairs, device=device)
    return Inputs(index + 1, torch.zeros_like(index), one, one.clone(), mean, torch.full_like(mean, 0.05), text, micro)


def our_step(made: tuple[PairStep, Inputs, Tensor], setting: Setting) -> Callable[[], Any]:
    """The trainer's micro-step on what `step_of` made, forward and backward; as a replayed CUDA graph where asked for."""
    step, inputs, correction = made
    recorded = torch.full((2, setting.pairs), 0.1, device=correction.device) if setting.recorded else None

    def run() -> None:
        terms = step(inputs, correction, recorded=recorded)
        (terms.loss.sum() / EFFECTIVE).backward()

    if not setting.graph:
        return run
    graph, _ = captured(run)
    return graph.replay


def optimizer_seconds(kind: str, parameters: list[Tensor], device: torch.device) -> float:
    """One update, which 2048 pairs share."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    made = optimizer.build(kind, parameters, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    return median_seconds(made.step, device, 0.2)


def needed(model: Size, setting: Setting) -> int:
    """Bytes at the peak of an update, estimated: weights, gradients, states, the reference, activations, and what no tensor shows."""
    per_parameter = 2.0 if setting.low_rank else 4 + 4 + STATES[setting.optimizer]
    per_parameter += 0 if setting.recorded or setting.low_rank else 2
    images = 2 * setting.pairs * (RECOMPUTED if setting.checkpointing else 1)
    total = round(model.parameters * per_parameter + images * model.activations[setting.kernels] * GIB)
    return total + sum(unseen(total).values())


def ours(model: Size, setting: Setting, device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """One row of the ladder; not tried where it cannot fit."""
    row: dict[str, Any] = {"model": model.name, "setting": setting.name, "pairs": setting.pairs}
    estimate = needed(model, setting)
    row["GiB, estimated"] = estimate / GIB
    why = not_tried(estimate, device)
    if device.type != "cuda" and (setting.graph or setting.compiled):
        why = "not tried: needs a GPU"
    if why is not None:
        yield row | {"failed": why}
        return
    if setting.deterministic:
        make_deterministic()
    bandwidth(device)  # while there is room
    forget_peak(device)
    made = step_of(model, setting, device)
    parameters: list[Tensor] = [p for p in made[0].model.denoiser.parameters() if p.requires_grad]
    row |= measured(our_step(made, setting), parameters, setting.optimizer, setting.pairs, device, budget)
    if not setting.graph and not setting.compiled:
        row[OUTSIDE] = 1 - median_seconds(unet_alone(made, setting), device, budget) * 1e3 / row["ms"]
    predicted = (
        model.predicted.get(setting.pairs) if setting == replace(next(ladder(model)), pairs=setting.pairs) else None
    )
    if predicted is not None:
        row |= {"predicted on H100": predicted[0], "MFU predicted": predicted[1]}
    yield row | rates(model, setting, row["pairs/s"], device)


def peers(model: Size, low_rank: bool, device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """The row of the peers' step."""
    setting = Setting(f"peers: {'LoRA' if low_rank else 'all weights'}", low_rank=low_rank)
    row: dict[str, Any] = {"model": model.name, "setting": setting.name, "pairs": 1}
    bandwidth(device)
    forget_peak(device)
    step, parameters = peers_step(model, device, low_rank)
    kind = "adamw" if low_rank else model.peer_optimizer
    row |= measured(step, parameters, kind, 1, device, budget)
    if model.peers is not None and not low_rank:
        row["predicted on H100"] = model.peers
    yield row | rates(model, setting, row["pairs/s"], device)


def not_tried(estimate: int, device: torch.device) -> str | None:
    """Why a row that takes so many bytes is not tried on this device; None where it fits."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return f"not tried: {free / GIB:.0f} GiB are free" if estimate > free else None


def rates(model: Size, setting: Setting, pairs_per_s: float, device: torch.device) -> dict[str, Any]:
    """Useful TFLOP/s and MFU of a rate, and the rates that FLOPs and bytes alone would allow.

    Bytes: weights once for each pass in half precision, activations written once and read once.
    """
    side = model.unet["sample_size"]
    forward = flops.unet_flops(model.unet, side, side, model.text[0])
    trained = "lora" if setting.low_rank else "full"
    work = flops.pair_flops(forward, trainable=trained, reference="recorded" if setting.recorded else "live")
    passes = 3 if setting.recorded else 4
    moved = passes * 2 * model.parameters / setting.pairs + 2 * 2 * model.activations[setting.kernels] * GIB
    return share_of_peak(work, pairs_per_s, device) | {"bound by bytes": bandwidth(device) / moved}


def share_of_peak(work: float, pairs_per_s: float, device: torch.device) -> dict[str, float | None]:
    """Useful TFLOP/s and MFU of a rate, and the rate that FLOPs alone would allow; work: FLOPs of a pair."""
    peak = flops.peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "TFLOP/s": work * pairs_per_s / 1e12,
        "MFU": None if peak is None else work * pairs_per_s / 1e12 / peak,
        "bound by FLOPs": None if peak is None else peak * 1e12 / work,
    }


def unet_alone(made: tuple[PairStep, Inputs, Tensor], setting: Setting) -> Callable[[], Any]:
    """The denoiser's part of a micro-step: the policy forward and backward, the live reference forward."""
    step, inputs, correction = made
    x_t, t = inputs.latent_mean, torch.arange(2 * setting.pairs, device=correction.device)
    text, half = inputs.text.twice(), step.autocast

    def run() -> None:
        with torch.autocast(correction.device.type, half, enabled=half is not None):
            predicted = step.policy(x_t, t, text, inputs.micro)
            if step.reference is not None:
                step.reference(x_t, t, text, inputs.micro)
        predicted.float().sum().backward()

    return run


def profile(model: Size, setting: Setting, device: torch.device) -> Iterator[dict[str, Any]]:
    """The 15 kernels (on a CPU: operations) that take the most of a micro-step's time."""
    if setting.deterministic:
        make_deterministic()
    run = our_step(step_of(model, setting, device), setting)
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # An operation's own row repeats the time of the kernels that it launches.
    events = [e for e in seen.key_averages() if device.type == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, name) for event in events) or 1.0
    for event in sorted(events, key=lambda event: getattr(event, name), reverse=True)[:15]:
        taken = getattr(event, name)
        yield {
            "model": model.name, "setting": setting.name, "pairs": setting.pairs, "kernel": event.key[:100],
            "calls": event.count, "ms": taken / 1e3, "share": taken / total,
        }  # fmt: skip


def measured(
    step: Callable[[], Any], parameters: list[Tensor], kind: str, pairs: int, device: torch.device, budget: float
) -> dict[str, Any]:
    """Time of a micro-step of so many pairs and of an update, the rate of both, and on a GPU the peak of memory."""
    seconds = median_seconds(step, device, budget)
    update = optimizer_seconds(kind, parameters, device)
    row = {"ms": seconds * 1e3, "ms an update": update * 1e3, "pairs/s": 1 / (seconds / pairs + update / EFFECTIVE)}
    if device.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated(device) / GIB
        row["GiB, reserved"] = torch.cuda.max_memory_reserved(device) / GIB
    return row


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

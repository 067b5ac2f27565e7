"""Policy and reference of a run, made from one loaded model; the step on both, and the updater of what is trained."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo import credit, reference, schedule
from dpo.common.words import digest
from dpo.data.buckets import shapes, step_of
from dpo.data.pairs import Source
from dpo.methods import METHODS
from dpo.models import lora
from dpo.models.adapter import Adapter
from dpo.models.apart import cores_for
from dpo.models.denoiser import halve
from dpo.models.family import Denoise, Denoiser, Model
from dpo.models.fingerprint import checksum, fingerprint
from dpo.models.ready import HALF, WEIGHTS, plan_of
from dpo.objective import Kto, Odds
from dpo.settings.config import Config
from dpo.step import Levels, PairStep
from dpo.training import optimizer
from dpo.training.outset import start_of
from dpo.training.release import Release
from dpo.training.start import Start
from dpo.training.strength import Centre, Strength

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from dpo.common.cores import Cores
    from dpo.training.parallel import Processes
    from dpo.training.sharding import Shards

log = logging.getLogger("dpo")


def hashes(name: str, denoiser: Denoiser, precision: str = "fp32") -> dict[str, str]:
    """The two hashes of a denoiser's weights, by name; precision: of the run, whose weights they are cast to."""
    dtype = WEIGHTS.get(precision, torch.float32)  # frozen ones may be narrower so far
    return {name: fingerprint(denoiser), f"{name}_checksum": checksum(denoiser, dtype=dtype)}


def live_reference(config: Config) -> bool:
    """Whether the reference's errors are computed in every step."""
    return METHODS[config.method.method].reference and config.runtime.reference != "recorded"


def make_reference(config: Config, model: Model, begin: Start) -> tuple[Denoiser | None, dict[str, str]]:
    """A frozen copy where the reference needs its own weights (else None), and the hashes of its weights.

    Also puts the starting weights into the policy. With recorded errors, a policy that starts from other weights than
    the reference needs the copy for the held-out pairs alone.
    """
    apart = _apart(config, begin)
    if not apart:
        begin.put(model)
    twin = copy_for_reference(config, model.denoiser, begin)
    weights = hashes("reference", model.denoiser, config.runtime.precision)
    if apart:
        begin.put(model)
    return twin, weights


def copy_for_reference(config: Config, denoiser: Denoiser, begin: Start) -> Denoiser | None:
    """A frozen copy of `denoiser` where the reference needs its own weights, else None."""
    compared = METHODS[config.method.method].reference
    own = compared and (_apart(config, begin) or not (config.lora.lora or config.runtime.reference == "recorded"))
    return reference.frozen(denoiser, HALF.get(config.runtime.precision)) if own else None


def _apart(config: Config, begin: Start) -> bool:
    """Whether the policy starts from other weights than the reference has."""
    return begin.moved and config.model.reference_model == "base"


def make_policy(config: Config, denoiser: Denoiser, adapter: Adapter | None) -> list[BaseTunerLayer]:
    """Makes the policy trainable: by adapters, whose layers are returned, or in all its weights.

    adapter: what the adapters begin as; None for fresh ones.
    """
    low_rank = config.lora
    denoiser.eval()  # no dropout of the network's own; that of adapters is keyed
    if not low_rank.lora:
        denoiser.requires_grad_(True)
        return []
    assert low_rank.alpha is not None and low_rank.target_modules is not None, "decided when the model was loaded"
    layers = lora.add(
        denoiser,
        rank=low_rank.rank,
        alpha=low_rank.alpha,
        target_modules=low_rank.target_modules,
        dropout=low_rank.lora_dropout,
        seed=config.runtime.seed,
    )
    if adapter is not None:
        lora.begin_as(denoiser, adapter)
    if config.runtime.precision in HALF:
        halve(denoiser, HALF[config.runtime.precision])
    return layers


def cores_of(config: Config, model: Model, device: torch.device, processes: Processes) -> Cores | None:
    """The cores of a CPU that share the samples of a batch; None where all work on each operation together.

    Dropout has masks of the whole batch; compiled code, autocast and half-precision sums are left as they are, and what
    releases gradients for want of memory has none for those of parts.
    """
    runtime = config.runtime
    whole = runtime.compile or config.lora.lora_dropout or config.optim.gradient_release or processes.count > 1
    return None if whole or runtime.precision not in ("fp32", "fp64") else cores_for(device, model.denoiser, model.vae)


def is_sharded(config: Config, processes: Processes) -> bool:
    return config.runtime.sharding == "on" and processes.count > 1


def shards_of(config: Config, denoiser: Denoiser, device: torch.device, processes: Processes) -> Shards | None:
    """Policy or reference cut over the processes, where the settings ask for it; None otherwise.

    Raises UserError for a number of processes that does not fit the optimizer.
    """
    if not is_sharded(config, processes):
        return None
    trained = any(p.requires_grad for p in denoiser.parameters())
    from dpo.training import sharding  # it imports much of torch.distributed

    eight_bit = trained and config.optim.optimizer == "adamw8bit"
    if eight_bit:
        sharding.check_blocks(denoiser, processes.count)
    shards = sharding.Shards(denoiser, device, blocks_of_states=eight_bit)
    if trained:
        log.info("sharding: each of %d processes holds %s of the weights", processes.count, f"{shards.share():.1%}")
    return shards


def drawn(config: Config, plan: schedule.Plan) -> Tensor:
    """The timesteps that a decided config draws from, ascending [K] int64: see `schedule.to_draw`. Raises UserError."""
    method = config.method
    draw = schedule.Draw(method.timestep_draw, method.logit_mean, method.logit_std)
    return schedule.to_draw(plan, method.window_low, method.window_high, draw)


def every_drawn(config: Config, model: Model, plan: schedule.Plan) -> Tensor:
    """The timesteps that are ever drawn, in the square or any bucket, ascending [K] int64. Raises UserError."""
    plans = plan, *_plans(config, model).values()
    return torch.cat([drawn(config, one) for one in plans]).unique()


def beside(config: Config, model: Model) -> dict[str, Any]:
    """What recorded errors depend on with a decided config of flow matching alone; nothing with the others.

    Levels that are not drawn alike come from a list of the whole window, so the window is a part of it; of buckets so
    are the levels of every shape.
    """
    method, told = config.method, config.model.train_guidance
    found: dict[str, Any] = {} if told is None else {"train_guidance": told}
    if shaped := _plans(config, model):
        levels = (f"{size} {plan.content().numpy().tobytes().hex()}" for size, plan in sorted(shaped.items()))
        found["schedule_of_shapes"] = digest(*levels)
    if method.timestep_draw != schedule.GRID:
        normal = f" {method.logit_mean!r} {method.logit_std!r}" if method.timestep_draw == schedule.LOGIT_NORMAL else ""
        found["timestep_draw"] = f"{method.timestep_draw}{normal} in [{method.window_low}, {method.window_high})"
    return found


def pair_step(
    config: Config,
    model: Model,
    plan: schedule.Plan,
    policy: Denoise,
    compared: Denoise | None,
    device: torch.device,
) -> tuple[PairStep, credit.Tables]:
    """The forward of a micro-batch, and the method's tables [T] in float64.

    compared: the reference, where it is live.
    """
    method, precision = config.method, config.runtime.precision
    row = METHODS[method.method]
    assert method.beta is not None, "decided when the model was loaded"
    tables = _tables(config, plan)
    real = torch.float64 if precision == "fp64" else torch.float32
    shift, scale = (
        torch.tensor(values, dtype=real, device=device) for values in model.scaling or model.family.scaling(model.vae)
    )
    step = PairStep(
        model=model,
        policy=policy,
        reference=compared,
        path=schedule.noise_path(plan, drawn(config, plan), real, device),
        weight=tables.weight.to(device, real),
        beta=torch.tensor(method.beta * (2 if "kto_center" in row.settings else 1), dtype=real, device=device),
        seed=torch.tensor(config.runtime.seed, dtype=torch.int64, device=device),
        scaling=(shift, scale),
        shaped=_shaped(config, model, real, device),
        shape=method.loss if "loss" in row.settings else None,
        sft_weight=method.sft_weight,
        alpha=method.loss_alpha,
        norm_penalty=method.norm_penalty,
        kto=_kto(config, real, device) if "kto_center" in row.settings else None,
        safeguard=method.safeguard if "safeguard" in row.settings else None,
        odds=Odds(method.mapo_weight, method.mapo_scale) if "mapo_weight" in row.settings else None,
        autocast=HALF.get(precision),
        dtype=WEIGHTS.get(precision, torch.float32),
    )
    return step, tables


def _plans(config: Config, model: Model) -> dict[tuple[int, int], schedule.Plan]:
    """The noise levels of each shape of latents (h, w), where buckets have levels of their own; empty otherwise."""
    flow, side, shape = model.family.flow, config.data.resolution, model.geometry
    if flow is None or not config.data.buckets or not model.scheduler_config["use_dynamic_shifting"]:
        return {}
    assert side is not None, "decided when the model was loaded"
    sizes = shapes(side, step_of(side, shape.side_factor))
    return {
        (high // shape.vae_scale, wide // shape.vae_scale): plan_of(config, model, (high, wide))[0]
        for high, wide in sizes
    }


def _shaped(config: Config, model: Model, real: torch.dtype, device: torch.device) -> dict[tuple[int, int], Levels]:
    """What follows from the noise levels of each shape of latents (h, w), where buckets have levels of their own."""
    found = {}
    for row, (size, plan) in enumerate(_plans(config, model).items(), start=1):
        path = schedule.noise_path(plan, drawn(config, plan), real, device)
        tables = _tables(config, plan)
        found[size] = Levels(path, tables.weight.to(device, real), tables.precision.to(device), row)
    return found


def _tables(config: Config, plan: schedule.Plan) -> credit.Tables:
    method = config.method
    return credit.tables(
        method.method, plan, gamma=method.gamma, cap=method.weight_cap, sigma2=method.sigma2, kappa=method.kappa
    )


def _kto(config: Config, real: torch.dtype, device: torch.device) -> Kto:
    """KTO's weights, and its centre before the first update, or how it is taken from each micro-batch."""
    method = config.method
    center = torch.zeros((), dtype=real, device=device) if method.kto_center == "update" else "batch"
    return Kto(center, method.kto_liked_weight, method.kto_disliked_weight)


def following(config: Config, step: PairStep, source: Source) -> list[Strength | Centre]:
    """What follows the updates that were made: beta by target, KTO's centre."""
    method = config.method
    found: list[Strength | Centre] = []
    assert method.beta is not None, "decided when the model was loaded"
    if method.target_gradient_factor is not None and (start := start_of(config, source)) is not None:
        found.append(Strength(step.beta, method.beta, method.target_gradient_factor, method.beta, start.pull))
    if step.kto is not None and isinstance(step.kto.center, Tensor):
        found.append(Centre(step.kto.center, method.beta))
    return found


def make_updater(config: Config, denoiser: Denoiser, shards: Shards | None = None) -> optimizer.Updater:
    """The updater of what is trained in `denoiser`; of its `shards`, this process's rows of all of it."""
    optim = config.optim
    trained: dict[str, Tensor] = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    parameters = list(trained.values()) if shards is None else shards.parameters
    made = optimizer.build(
        optim.optimizer,
        parameters,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        seed=config.runtime.seed,
        parts=None if shards is None else shards.parts,
    )
    scaler = torch.amp.GradScaler(parameters[0].device.type) if config.runtime.precision == "fp16" else None
    release = Release(made, parameters, optim.max_grad_norm) if optim.gradient_release else None
    log.info(
        "training %s of %.1f M parameters",
        f"{sum(p.numel() for p in trained.values()):,}",
        sum(p.numel() for p in denoiser.parameters()) / 1e6,
    )
    if optim.ema:
        log.info(
            "averaged weights (--ema %g): they are the result, and held-out accuracy and sample images are theirs; "
            "the figures of each update are of the weights in training",
            optim.ema,
        )
    if optim.pairs > optim.batch_size and (size := optimizer.accumulate_in_fp32(parameters)):
        log.info("gradients of bf16 weights are summed in fp32 over the passes of an update: %.1f GiB", size / 2**30)
    if release is not None:
        log.info(
            "gradient release: each weight is updated inside backward; clipping goes by the norm of the update before (the "
            "first is not clipped), and a gradient that is not finite leaves its own weights as they are"
        )
    return optimizer.Updater(
        list(trained), parameters, made, optim.max_grad_norm, scaler, optim.ema, release=release, shards=shards
    )

"""From a checked config to a run that is ready for its next update: model, data, reference, optimizer, tables.

What can be refused is refused in the order of its cost: output folder, model index, data, checkpoint, and only then weights.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo import credit, reference, schedule
from dpo.common.errors import UserError
from dpo.correction import CorrectionTable
from dpo.data.batches import held_out_batches
from dpo.data.loader import Reading
from dpo.data.pairs import Source
from dpo.data.sources import describe, open_sources
from dpo.data.store import recorded
from dpo.data.store.store import of_store
from dpo.encode import Encoder
from dpo.methods import METHODS
from dpo.models import lora
from dpo.models.denoiser import halve
from dpo.models.family import Model
from dpo.models.fingerprint import fingerprint
from dpo.models.hub import check_part, locate
from dpo.models.load import load_unet_into
from dpo.models.ready import HALF, WEIGHTS, cast, load_model, pick_device, settle
from dpo.pages.folder import CHECKPOINTS
from dpo.settings import advice, resolve
from dpo.settings.config import Config
from dpo.step import PairStep
from dpo.training import checkpoint, flops, optimizer, stored, validation
from dpo.training.embedded import embedded
from dpo.training.folder import check_output
from dpo.training.run import Run, Speed
from dpo.training.state import check_resume, restore

log = logging.getLogger("dpo")


def build(config: Config, notes: list[str]) -> Run:
    """Make the run of `config`; `notes` are what reading the command line had to say."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"started as {processes} processes: this trainer uses one GPU; give torchrun --nproc-per-node 1 and a larger --accumulation"
        )
    torch.manual_seed(config.runtime.seed)  # for libraries that initialise weights; no update consumes it
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.runtime.tf32
    device = pick_device(config.runtime.device)
    output = check_output(config)
    config = embedded(config)
    named = config.model
    locate(named.model, revision=named.revision, variant=named.variant, cache_dir=named.cache_dir)
    for flag, part in (("--vae", named.vae), ("--unet-init", named.unet_init)):
        check_part(flag, part)
    source, held_out_source = open_sources(config.data)
    log.info("pairs: %s", describe(source))
    saved = _saved(config, output)
    config, model, plan, decided = load_model(stored.adopt(config, source), device)
    for line in [*notes, *decided]:
        log.info("%s", line)
    for line in advice.warnings(config):
        log.warning("%s", line)
    log.info("%s", advice.headline(config))
    if saved is not None:
        check_resume(config, saved)
    stored.check(model, source, held_out_source)
    prints = {"model": fingerprint(model.denoiser), "data": source.fingerprint}
    cast(config, model)
    twin, prints["reference"] = _make_reference(config, model)
    errors = _recorded(config, plan, source, prints["reference"])
    if errors is not None:
        source = errors.covered(source)
    layers = _make_policy(config, model.denoiser)
    policy = settle(config, model.denoiser, device)
    if twin is not None:
        predict = reference.from_copy(settle(config, twin, device))
    else:
        predict = reference.from_adapters(policy, layers) if _live_reference(config) else None
    step, tables = pair_step(config, model, plan, policy, None if errors else predict, device)
    encoder = Encoder(model, device, config.runtime.vae_batch, offload=config.runtime.offload == "on")
    run = Run(
        config=config,
        model=model,
        source=source,
        encoder=encoder,
        step=step,
        updater=_updater(config, model.denoiser),
        table=CorrectionTable.zeros(tables.precision.to(device), config.method.rho),
        held_out=_held_out(config, held_out_source, step, encoder, predict),
        output=output,
        fingerprints=prints,
        schedule=plan,
        speed=_speed(config, model, device, encoded=of_store(source) is not None),
        device=device,
        held_out_source=held_out_source,
        total=resolve.total_steps(config, len(source)),
        recorded=errors,
    )
    if errors is not None:
        step.path = replace(step.path, timesteps=errors.timesteps.to(device))  # a window chooses among the recorded draws
    if saved is not None:
        restore(run, saved)
        if run.done >= run.total:
            log.warning("update %d of %d was made before: nothing is trained; raise --steps to go on", run.done, run.total)
    elif errors is not None and twin is None:
        log.info("recorded reference: %s", stored.noise(run.step, run.encoder, run.batches()))
    return run


def _saved(config: Config, output: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from. "latest" of a folder that has none yet is a fresh start, said in the log."""
    which, root = config.output.resume, output / CHECKPOINTS
    if which is None:
        return None
    if which == "latest" and not checkpoint.listing(root):
        log.warning("no checkpoint under %s yet: starting anew", root)
        return None
    return checkpoint.find(root, which)


def _recorded(config: Config, plan: schedule.Schedule, source: Source, reference: str) -> recorded.RecordedErrors | None:
    """The record of the reference's errors that suits the run, where it takes one in place of a reference model."""
    if config.runtime.reference != "recorded":
        return None
    timesteps = schedule.usable_timesteps(plan, config.method.window_low, config.method.window_high)
    return recorded.find(source, recorded.identity(config.data, config.runtime, plan, reference), timesteps)


def _make_reference(config: Config, model: Model) -> tuple[nn.Module | None, str]:
    """A frozen copy of the UNet where the reference needs one of its own, and its fingerprint; the policy's start, if it is another UNet.

    With recorded errors a policy that starts apart from the reference needs the copy for the held-out pairs alone.
    """
    named = config.model
    apart = named.unet_init is not None and named.reference_model == "base"
    if named.unet_init and not apart:
        load_unet_into(model.denoiser, named.unet_init)
    compared = METHODS[config.method.method].reference
    own = compared and (apart or not (config.lora.lora or config.runtime.reference == "recorded"))
    twin = reference.frozen(model.denoiser, HALF.get(config.runtime.precision)) if own else None
    identity = fingerprint(model.denoiser)
    if apart:
        load_unet_into(model.denoiser, named.unet_init)
    return twin, identity


def _live_reference(config: Config) -> bool:
    """Whether the reference's errors are computed in every step."""
    return METHODS[config.method.method].reference and config.runtime.reference != "recorded"


def _make_policy(config: Config, unet: nn.Module) -> list[nn.Module]:
    """Adapters (their layers are returned), or all weights trainable."""
    low_rank = config.lora
    unet.train(low_rank.lora_dropout > 0)
    if not low_rank.lora:
        unet.requires_grad_(True)
        return []
    layers = lora.add(
        unet,
        rank=low_rank.rank,
        alpha=low_rank.alpha,
        target_modules=low_rank.target_modules,
        dropout=low_rank.lora_dropout,
        seed=config.runtime.seed,
    )
    if config.runtime.precision in HALF:
        halve(unet, HALF[config.runtime.precision])
    return layers


def pair_step(
    config: Config,
    model: Model,
    plan: schedule.Schedule,
    policy: Any,
    predict: reference.Predict | None,
    device: torch.device,
) -> tuple[PairStep, credit.Tables]:
    method, precision = config.method, config.runtime.precision
    tables = credit.tables(method.method, plan, gamma=method.gamma, cap=method.weight_cap, sigma2=method.sigma2)
    real = torch.float64 if precision == "fp64" else torch.float32
    timesteps = schedule.usable_timesteps(plan, method.window_low, method.window_high)
    step = PairStep(
        model=model,
        policy=policy,
        reference=predict,
        path=schedule.noise_path(plan, timesteps, real, device),
        weight=tables.weight.to(device, real),
        beta=torch.tensor(method.beta, dtype=real, device=device),
        seed=torch.tensor(config.runtime.seed, dtype=torch.int64, device=device),
        shape=method.loss if METHODS[method.method].images == "pair" else None,
        sft_weight=method.sft_weight,
        autocast=HALF.get(precision),
        dtype=WEIGHTS.get(precision, torch.float32),
    )
    return step, tables


def _updater(config: Config, unet: nn.Module) -> optimizer.Updater:
    optim = config.optim
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    made = optimizer.build(
        optim.optimizer,
        parameters,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        seed=config.runtime.seed,
    )
    scaler = torch.amp.GradScaler(parameters[0].device.type) if config.runtime.precision == "fp16" else None
    log.info(
        "training %s of %.1f M parameters",
        f"{sum(p.numel() for p in parameters):,}",
        sum(p.numel() for p in unet.parameters()) / 1e6,
    )
    return optimizer.Updater(list(trained), parameters, made, optim.max_grad_norm, scaler, optim.ema)


def _held_out(
    config: Config, source: Source | None, step: PairStep, encoder: Encoder, predict: reference.Predict | None
) -> validation.HeldOut | None:
    """The held-out pairs, encoded, with their reference errors."""
    if source is None or not config.output.validate_every:
        return None
    data = config.data
    log.info("held-out accuracy: %d pairs, %d draws each", len(source), data.validation_draws)
    assert data.resolution is not None  # decided when the model was loaded
    stream = held_out_batches(source, config.optim.batch_size, data.resolution, replace(Reading.of(data), workers=0))
    return validation.prepare(step, encoder, stream, data.validation_draws, predict)


def _speed(config: Config, model: Model, device: torch.device, encoded: bool) -> Speed:
    side = config.data.resolution // model.vae_scale
    text = model.text_encoders[0].config.max_position_embeddings
    forward = flops.unet_flops(dict(model.denoiser.config), side, side, text)
    encode = flops.vae_encode_flops(dict(model.vae.config), config.data.resolution, config.data.resolution)
    per_pair = flops.pair_flops(
        forward,
        trainable="lora" if config.lora.lora else "full",
        reference="live" if _live_reference(config) else None,
        halves=2 if METHODS[config.method.method].images == "pair" else 1,
        encode=0.0 if encoded else encode,
    )
    peak = flops.peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Speed(per_pair, peak)

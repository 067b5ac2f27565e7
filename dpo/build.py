"""From a checked config to a run that is ready for its next update: model, data, reference, optimizer, tables.

What can be refused is refused in the order of its cost: output folder, model index, data, checkpoint, and only then weights.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo import checkpoint, decisions, flops, objective, optimizer, prepared, record, reference, schedule, validation
from dpo.config import Config, change
from dpo.correction import CorrectionTable
from dpo.data import Source, describe, held_out_batches, of_store, open_sources
from dpo.errors import UserError
from dpo.models import Components, lora
from dpo.models.load import check_part, fingerprint, load, load_unet_into, locate
from dpo.models.unet import available_attention, fix_projections, halve, use_attention, use_checkpointing
from dpo.run import Run, Speed, check_resume, restore
from dpo.step import Encoder, PairStep

log = logging.getLogger("dpo")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = {"bf16-pure": torch.bfloat16, "fp64": torch.float64}


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU when there is one. Raises UserError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu or install a CUDA build of torch")
    return torch.device(name)


WRITTEN = ("README.md", "report.html", "unet", "vae", "text_encoder")  # by a run's end: what a stranger's folder might have too


def check_output(config: Config) -> Path:
    """The output folder, unless it cannot be one or holds another run that is neither resumed nor to be replaced."""
    output = Path(config.output.output).expanduser()
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: {there} is not writable; choose another folder")
    if config.model.model and output.resolve() == Path(config.model.model).expanduser().resolve():
        raise UserError(f"--output {output} is the folder of the model itself, which would be replaced; name another folder")
    occupied = (output / "config.toml").exists() or (output / "checkpoints").exists() or (output / "model_index.json").exists()
    if occupied and not config.output.resume and not config.output.overwrite:
        raise UserError(
            f"{output} holds another run: go on with it (--resume latest), replace it (--overwrite) or name another --output"
        )
    foreign = [] if occupied or config.output.overwrite else [name for name in WRITTEN if (output / name).exists()]
    if foreign:
        raise UserError(
            f"{output} is no run and has {', '.join(foreign)}, which would be replaced: name another --output, or add --overwrite"
        )
    return output


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
    config, model, plan, decided = load_model(prepared.adopt(config, source), device)
    for line in [*notes, *decided]:
        log.info("%s", line)
    for line in decisions.warnings(config):
        log.warning("%s", line)
    log.info("%s", decisions.headline(config))
    if saved is not None:
        check_resume(config, saved)
    prepared.check(model, source, held_out_source)
    prints = {"model": fingerprint(model.unet), "data": source.fingerprint}
    cast(config, model)
    twin, prints["reference"] = _make_reference(config, model)
    recorded = record.find(config, model, plan, source, prints["reference"]) if config.runtime.reference == "recorded" else None
    if recorded is not None:
        source = recorded.covered(source)
    layers = _make_policy(config, model.unet)
    policy = settle(config, model.unet, device)
    pairwise = objective.METHODS[config.method.method].pairwise and config.runtime.reference != "recorded"
    if twin is not None:
        predict = reference.from_copy(settle(config, twin, device))
    else:
        predict = reference.from_adapters(policy, layers) if pairwise else None
    step, tables = pair_step(config, model, plan, policy, None if recorded else predict, device)
    encoder = Encoder(model, device, config.runtime.vae_batch, offload=config.runtime.offload == "on")
    run = Run(
        config=config,
        model=model,
        source=source,
        encoder=encoder,
        step=step,
        updater=_updater(config, model.unet),
        table=CorrectionTable.zeros(tables.precision.to(device), config.method.rho),
        held_out=_held_out(config, held_out_source, step, encoder, predict),
        output=output,
        fingerprints=prints,
        schedule=plan,
        speed=_speed(config, model, device, encoded=of_store(source) is not None),
        device=device,
        held_out_source=held_out_source,
        total=decisions.total_steps(config, len(source)),
        recorded=recorded,
    )
    if recorded is not None:
        step.timesteps = recorded.timesteps.to(device)  # a window chooses among the recorded draws
    if saved is not None:
        restore(run, saved)
        if run.done >= run.total:
            log.warning("update %d of %d was made before: nothing is trained; raise --steps to go on", run.done, run.total)
    elif recorded is not None and twin is None:
        log.info("recorded reference: %s", record.noise(run.step, run.encoder, run.batches()))
    return run


def _saved(config: Config, output: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from. "latest" of a folder that has none yet is a fresh start, said in the log."""
    which, root = config.output.resume, output / "checkpoints"
    if which is None:
        return None
    if which == "latest" and not checkpoint.listing(root):
        log.warning("no checkpoint under %s yet: starting anew", root)
        return None
    return checkpoint.find(root, which)


def embedded(config: Config) -> Config:
    """`config` with the small world inside the package where no model or no data is named."""
    from dpo import tiny

    if config.model.model is None:
        config = change(config, model=str(tiny.pipeline_path()))
    if config.data.data is None:
        config = change(config, data=str(tiny.train_pairs_path()))
        if config.data.validation_data is None and not config.data.validation_fraction:
            config = change(config, validation_data=str(tiny.validation_pairs_path()))
    return config


def load_named(config: Config) -> Components:
    """The model that the settings name, as it is stored: fp32, on the CPU."""
    named = config.model
    return load(
        named.model,
        family=named.family,
        revision=named.revision,
        variant=named.variant,
        vae=named.vae,
        single_file_config=named.single_file_config,
        cache_dir=named.cache_dir,
    )


def load_model(config: Config, device: torch.device) -> tuple[Config, Components, schedule.Schedule, list[str]]:
    """The config with everything decided, weights on the CPU in fp32, the noise schedule, and what was decided, in words."""
    model = load_named(config)
    config, decided = decisions.resolve(
        config,
        family=model.family.name,
        beta=model.family.beta,
        guidance=model.family.guidance,
        prediction_type=model.scheduler_config.get("prediction_type", "epsilon"),
        device=str(device),
        turbo=model.turbo,
        native_resolution=model.native_resolution,
        num_timesteps=model.scheduler_config.get("num_train_timesteps", 1000),
        bf16=device.type != "cuda" or torch.cuda.is_bf16_supported(),
    )
    config = change(config, attention=available_attention(config.runtime.attention))  # said once, not for each UNet
    plan = schedule.from_scheduler(
        model.scheduler_config,
        prediction_type=config.model.prediction_type,
        turbo=config.model.timesteps == "turbo",
        zero_snr={"on": True, "off": False}.get(config.model.zero_snr),
    )
    model.prediction_type = plan.prediction_type
    return config, model, plan, decided


def cast(config: Config, model: Components) -> None:
    """Every module in the run's dtype: fp32 master weights for the UNet under autocast, half precision for what is only read.

    SDXL's VAE overflows in fp16 and stays in fp32 there.
    """
    precision = config.runtime.precision
    own = WEIGHTS.get(precision, torch.float32)
    read_only = HALF.get(precision, own)
    model.unet.to(own)
    model.vae.to(torch.float32 if precision == "fp16" and model.family.name == "sdxl" else read_only)
    for encoder in model.text_encoders:
        encoder.to(read_only)


def _make_reference(config: Config, model: Components) -> tuple[nn.Module | None, str]:
    """A frozen copy of the UNet where the reference needs one of its own, and its fingerprint; the policy's start, if it is another UNet.

    With recorded errors a policy that starts apart from the reference needs the copy for the held-out pairs alone.
    """
    named = config.model
    apart = named.unet_init is not None and named.reference_model == "base"
    if named.unet_init and not apart:
        load_unet_into(model.unet, named.unet_init)
    pairwise = objective.METHODS[config.method.method].pairwise
    own = pairwise and (apart or not (config.lora.lora or config.runtime.reference == "recorded"))
    twin = reference.frozen(model.unet, HALF.get(config.runtime.precision)) if own else None
    identity = fingerprint(model.unet)
    if apart:
        load_unet_into(model.unet, named.unet_init)
    return twin, identity


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


def settle(config: Config, unet: nn.Module, device: torch.device) -> Any:
    """The same choices for policy and reference: device, layout, attention, checkpointing, kernels, compilation."""
    run = config.runtime
    unet.to(device)
    if run.channels_last == "on":
        unet.to(memory_format=torch.channels_last)
    fix_projections(unet)
    use_attention(unet, run.attention)
    use_checkpointing(unet, run.checkpointing)
    if run.kernels == "triton":
        from dpo.models import kernels

        kernels.patch(unet)
    return torch.compile(unet) if run.compile else unet


def pair_step(
    config: Config,
    model: Components,
    plan: schedule.Schedule,
    policy: Any,
    predict: reference.Predict | None,
    device: torch.device,
) -> tuple[PairStep, objective.Tables]:
    method, precision = config.method, config.runtime.precision
    tables = objective.tables(method.method, plan, gamma=method.gamma, cap=method.weight_cap, sigma2=method.sigma2)
    real = torch.float64 if precision == "fp64" else torch.float32
    step = PairStep(
        model=model,
        policy=policy,
        reference=predict,
        alphas_cumprod=plan.alphas_cumprod.to(device, real),
        timesteps=schedule.usable_timesteps(plan, method.window_low, method.window_high).to(device),
        weight=tables.weight.to(device, real),
        beta=torch.tensor(method.beta, dtype=real, device=device),
        seed=torch.tensor(config.runtime.seed, dtype=torch.int64, device=device),
        shape=method.loss,
        sft_weight=method.sft_weight,
        autocast=HALF.get(precision),
        dtype=WEIGHTS.get(precision, torch.float32),
        wins_only=not objective.METHODS[method.method].pairwise,
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
    stream = held_out_batches(source, data, micro_batch=config.optim.batch_size, resolution=data.resolution, workers=0)
    return validation.prepare(step, encoder, stream, data.validation_draws, predict)


def _speed(config: Config, model: Components, device: torch.device, encoded: bool) -> Speed:
    side = config.data.resolution // model.vae_scale
    text = model.text_encoders[0].config.max_position_embeddings
    forward = flops.unet_flops(dict(model.unet.config), side, side, text)
    encode = flops.vae_encode_flops(dict(model.vae.config), config.data.resolution, config.data.resolution)
    live = objective.METHODS[config.method.method].pairwise and config.runtime.reference != "recorded"
    per_pair = flops.pair_flops(
        forward,
        trainable="lora" if config.lora.lora else "full",
        reference="live" if live else None,
        halves=2 if objective.METHODS[config.method.method].pairwise else 1,
        encode=0.0 if encoded else encode,
    )
    peak = flops.peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Speed(per_pair, peak)

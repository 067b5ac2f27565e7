"""From a checked config to a run that is ready for its next update: model, data, reference, optimizer, tables.

Checks come in the order of their cost: output folder, local model, checkpoint, data, and only then downloads and weights.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from dpo import reference, schedule
from dpo.common.command import of_launcher
from dpo.common.errors import UserError
from dpo.common.words import digest, number_of
from dpo.correction import CorrectionTable
from dpo.data.batches import held_out_batches
from dpo.data.buckets import Buckets, find
from dpo.data.contents import stamps
from dpo.data.kept import keeping
from dpo.data.loader import Reading
from dpo.data.order import run_order
from dpo.data.pairs import Source, things
from dpo.data.sources import open_sources, tell
from dpo.data.store import recorded
from dpo.data.store.store import of_store
from dpo.encode import Encoder
from dpo.methods import METHODS
from dpo.models.apart import Apart
from dpo.models.buffers import positions
from dpo.models.dropout import masks_of
from dpo.models.family import Denoise, Model
from dpo.models.fingerprint import checksum, identity
from dpo.models.ready import cast, check_settings, held_narrow, load_model, pick_device, settle
from dpo.pages.folder import ADAPTER_FILE, CHECKPOINTS, INDEX_FILE
from dpo.settings import advice, resolve
from dpo.settings.config import Config, Output, Runtime, change
from dpo.step import PairStep
from dpo.training import (
    agreement,
    best,
    checkpoint,
    choice,
    cost,
    denoisers,
    optimizer,
    outset,
    start,
    stored,
    validation,
)
from dpo.training.deterministic import make_deterministic
from dpo.training.embedded import embedded
from dpo.training.folder import check_output, folder_of
from dpo.training.graph import Graphs
from dpo.training.metrics import StepMetrics
from dpo.training.parallel import Processes, Reduced
from dpo.training.run import Run, Speed
from dpo.training.state import as_before, check_complete, check_resume, keep_trained, restore
from dpo.training.strength import Strength

LOOKED_AT = 16  # updates, for the share of holes

log = logging.getLogger("dpo")


def build(config: Config, notes: list[str], processes: Processes | None = None, *, again: bool = False) -> Run:
    """Makes the run of `config`, restored from a checkpoint where one is resumed. Raises UserError.

    notes: lines for the log from reading the command line. processes: those that train it, this one among them.
    again: the run was made before, maybe by an earlier version, which refused less.
    """
    processes = processes or Processes()
    _start(config.runtime, processes)
    config = resolve.dealt(config, processes.count)
    if processes.count > 1 and config.optim.gradient_release:
        raise UserError(
            "--gradient-release updates weights before gradients are summed over processes: leave it out, or use one process"
        )
    if processes.count == 1 and config.runtime.sharding == "on":
        log.warning("--sharding on has no effect on one process: it holds the whole model")
    device = pick_device(processes.device(config.runtime.device))
    processes.join(device)
    output = check_output(config) if processes.first else folder_of(config)
    config = embedded(config)
    start.check_named(config.model)
    check_settings(config)
    optimizer.check_installed(config.optim.optimizer)

    saved = _saved(config.output, output, processes)
    config = _left_open(config, saved)
    source, held_out_source, data = open_sources(config.data)
    config = replace(config, data=data)
    tell(source)
    stored.check_sides(config, source, held_out_source)
    stored.check_labels(config, source)
    if not again and (saved is None or Strength.name not in saved.state.get("following", {})):
        outset.check_target(config, source)  # a checkpoint keeps its average

    config = stored.adopt(config, source)
    config, model, plan, decided = load_model(config, device, narrow=held_narrow(config, device))
    config, begin, told = start.read(config, model)
    _tell(config, [*notes, *decided, *told], processes.count, things(source))
    changed = check_resume(config, saved) if saved is not None else []
    stored.check(model, source, held_out_source)
    stored.check_resolution(held_out_source, config.data.resolution)
    fingerprints = _fingerprints(model, source) | positions(config.runtime.precision, *model.text_encoders)
    cast(model, config.runtime.precision, config.runtime.vae_precision, frozen=config.lora.lora)

    twin, weights = denoisers.make_reference(config, model, begin)
    fingerprints |= weights
    if begin.moved:
        fingerprints |= denoisers.hashes("start", model.denoiser, config.runtime.precision)
    errors = _recorded(config, model, plan, source, weights)
    if errors is not None:
        source = errors.covered(source)

    buckets = find(config.data, model.geometry.side_factor, source)

    total = resolve.total_steps(config, len(source))
    for line in advice.length(config, len(source), things(source)):
        log.info("%s", line)
    for line in advice.too_long(config, len(source), things(source)):
        log.warning("%s", line)
    live, encoded = denoisers.live_reference(config), of_store(source) is not None
    counted = cost.count(config, model, live_reference=live, encoded=encoded, sides=source.sides)
    trained = cost.training(counted, config, total, len(source), processes.count)
    config = _rhythm(config, counted, trained, total, held_out_source)
    best.check(config, held_out_source, total)

    layers = denoisers.make_policy(config, model.denoiser, begin.adapter)
    # What is sharded comes to the device block by block: whole it may not fit.
    place = torch.device("cpu") if denoisers.is_sharded(config, processes) else device
    settled = settle(config.runtime, model.denoiser, place)
    shards = denoisers.shards_of(config, model.denoiser, device, processes)
    updater = denoisers.make_updater(config, model.denoiser, shards)
    policy: Denoise = model.denoise(settled)
    cores = denoisers.cores_of(config, model, device, processes)
    if shards is not None:
        policy = shards.denoise(policy)
    elif processes.count > 1:
        policy = Reduced(model.denoise, settled)
    elif cores is not None:
        policy = Apart(policy, cores, updater.parameters)
    compared = None
    if twin is not None:
        copy = model.denoise(settle(config.runtime, twin, place))
        copy = copy if cores is None else Apart(copy, cores, ())
        cut = denoisers.shards_of(config, twin, device, processes)
        compared = reference.from_copy(copy if cut is None else cut.denoise(copy))
    elif live:
        compared = reference.from_adapters(policy, layers)
    step, tables = denoisers.pair_step(config, model, plan, policy, None if errors else compared, device)
    step.masks = masks_of(layers)
    encoder = Encoder(
        model,
        device,
        config.runtime.vae_batch,
        offload=config.runtime.offload == "on",
        zero_dropped=config.data.dropped_caption == "zeros",
        cores=cores,
    )

    run = Run(
        config=config,
        model=model,
        source=source,
        encoder=encoder,
        step=step,
        updater=updater,
        table=CorrectionTable.zeros(tables.precision.to(device), config.method.rho, step.timesteps, config.optim.pairs),
        held_out=_held_out(config, held_out_source, step, encoder, compared, processes),
        buckets=buckets,
        output=output,
        fingerprints=fingerprints,
        speed=Speed.of(counted, device),
        device=device,
        metrics=StepMetrics(tables.precision.numel()),
        held_out_source=held_out_source,
        total=total,
        recorded=errors,
        processes=processes,
        following=denoisers.following(config, step, source),
        graphs=Graphs(step, updater, config.optim.pairs) if config.runtime.cuda_graph else None,
    )
    if errors is not None and config.method.timestep_draw == schedule.GRID:
        step.draw_from(errors.timesteps.to(device))  # the timesteps of the recorded draws
    if saved is not None:
        restore(run, saved)
    run.best = choice.begin(run, saved)
    if saved is not None and (run.done >= run.total or run.ended):
        said = f"update {run.done} of {run.total} was made before"
        if run.done > run.total:
            said = f"{run.done} updates were made before, and {run.total} asked for now"
        raised = "--patience" if run.ended else "--steps"
        log.warning(
            "%s: nothing is trained; raise %s to go on (what is said above of new settings has no effect)", said, raised
        )
        keep_trained(run, saved)
    elif saved is not None:
        for line in changed:
            log.warning("changed on resume: %s", line)
    elif begin.adapter is None and not (begin.moved and config.model.reference_model == "base"):
        _say_noise(run)
    run.kept = keeping(
        config.data, config.runtime, source, config.optim.batch_size, run.total * run.nominal - run.position
    )
    encoder.keep = None if run.kept is None else run.kept.put
    if METHODS[config.method.method].correction:
        log.info("correction table: %d entries for %d timesteps", *run.table.size())
    if buckets is not None:
        _tell_buckets(run, buckets)
    held = held_out_source.fingerprint if held_out_source is not None else "none"
    made = {**fingerprints, "held-out pairs": held, "updates made": run.done, "torch version": torch.__version__}
    made |= {"buckets": digest(buckets.of.tobytes().hex())} if buckets else {}
    agreement.check_made(processes, run.config, made)
    return run


def _fingerprints(model: Model, source: Source) -> dict[str, str]:
    """What the run depends on, by content, before anything is cast: a resume compares it.

    Old checkpoints lack all but "model" and "data".
    """
    parts = identity(model)
    return {
        **denoisers.hashes("model", model.denoiser),
        "vae": parts["vae"],
        "vae_checksum": checksum(model.vae),
        "text": digest(*parts["text_encoders"], *parts["tokenizers"]),
        "text_checksum": checksum(*model.text_encoders, dtype=torch.float32),
        "data": source.fingerprint,
        **stamps(source),
    }


def _start(runtime: Runtime, processes: Processes) -> None:
    """Sets what holds for the whole process: seed, threads, TF32, determinism.

    Raises UserError when it is one of several processes that do not know each other: each would train on its own.
    """
    if (started := of_launcher("WORLD_SIZE", 1)) != processes.count:
        raise UserError(
            f"started as {started} processes, each of which would train on its own: several processes are for python -m "
            "dpo.train alone; start this command without torchrun"
        )
    torch.manual_seed(runtime.seed)  # for libraries that initialise weights; no update draws from it
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime.tf32
    if runtime.deterministic:
        make_deterministic()


def _saved(output: Output, folder: Path, processes: Processes) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume, None for a fresh start: all processes take the one that the first has found.

    Raises UserError where another does not see it.
    """
    if output.resume is None:
        return None
    found = _found(output, folder) if processes.first else None
    path, *_ = processes.objects(None if found is None else str(found.path.resolve()))
    if path is None or processes.first:
        return found
    try:
        return checkpoint.load(Path(path))
    except checkpoint.Damaged as error:
        raise UserError(
            f"{error} here, and not to process 0: --output must be a folder that all processes see"
        ) from error


def _found(output: Output, folder: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume, None for a fresh start.

    "latest" without any checkpoint starts afresh, with a warning. Raises UserError where a result is there, which that
    would replace.
    """
    which, root = output.resume, folder / CHECKPOINTS
    assert which is not None, "something is resumed"
    if which == "latest" and not checkpoint.listing(root):
        if results := [name for name in (INDEX_FILE, ADAPTER_FILE) if (folder / name).exists()]:
            raise UserError(
                f"{folder} has a result and no checkpoint to go on from, so training anew would replace {results[0]}: "
                "name another --output, or replace it (--overwrite instead of --resume)"
            )
        if left := checkpoint.set_aside(
            root
        ):  # a kill came while a run began to go on from one of them or from elsewhere
            raise UserError(
                f"{folder} has no checkpoint, but {number_of(len(left), 'checkpoints')} of branches that were gone back from: "
                f"name one, such as --resume {shlex.quote(str(left[-1]))}, or start anew with --overwrite"
            )
        log.warning("no checkpoint under %s yet: starting anew", root)
        return None
    return checkpoint.find(root, which, check_complete)


def _left_open(config: Config, saved: checkpoint.Checkpoint | None) -> Config:
    """`config` with what it leaves open on the pairs taken from the run that is resumed.

    Of a new run none are held out where they are never measured.
    """
    if saved is not None:
        return as_before(config, saved)
    data = config.data
    unmeasured = config.output.validate_every == 0 and data.validation_data is None and data.validation_fraction is None
    return change(config, validation_fraction=0.0) if unmeasured else config


def _tell(config: Config, lines: list[str], processes: int, what: str) -> None:
    """Logs `lines` (what was decided), the warnings on the settings, and the headline of the run."""
    for line in lines:
        log.info("%s", line)
    for line in advice.warnings(config, what):
        log.warning("%s", line)
    log.info("%s", advice.headline(config, processes, what))


def _say_noise(run: Run) -> None:
    """Logs how far from 0 the logit is at the start of a run whose policy and reference begin alike, where that may be."""
    if run.recorded is not None:
        cause = "recorded with another batch size, kernel choice or device"
        log.info("recorded reference: %s", stored.noise(run.step, run.encoder, run.batches(), cause))
    elif run.config.runtime.compile and run.step.reference is not None and run.processes.count == 1:
        cause = "compiled code rounds differently with and without a gradient"
        log.info("--compile: %s", stored.noise(run.step, run.encoder, run.batches(), cause, graded=True))
    elif run.device.type != "cpu" and run.step.reference is not None and run.processes.count == 1:
        log.info("%s", stored.step_zero(run.step, run.encoder, run.batches()))


def _tell_buckets(run: Run, buckets: Buckets) -> None:
    """Logs the shapes of the pairs, what they cut away, and how much of the next updates' work goes to holes."""
    log.info("%s", buckets.told())
    order = replace(run.order(run.position, run.position + LOOKED_AT * run.nominal), rank=0)
    places = list(run_order(run.source, order))
    passes = len(places) * run.processes.count
    holes = 100 - 100 * LOOKED_AT * run.nominal / (passes * order.micro_batch)
    log.info(
        "buckets: %.1f passes of %d %s an update, %.0f %% of them holes%s; FLOPs are counted for the square",
        passes / LOOKED_AT,
        order.micro_batch,
        run.things,
        holes,
        " (fewer with a smaller --batch-size)" if holes > 0 and order.micro_batch > 1 else "",
    )


def _recorded(
    config: Config, model: Model, plan: schedule.Plan, source: Source, weights: dict[str, str]
) -> recorded.RecordedErrors | None:
    """The recorded reference errors that suit the run, None where it computes them.

    weights: the reference's two hashes.
    """
    if config.runtime.reference != "recorded":
        return None
    beside = denoisers.beside(config, model)
    wanted = recorded.identity(config.data, config.runtime, plan, weights["reference"], beside)
    return recorded.find(source, wanted, denoisers.every_drawn(config, model, plan), weights["reference_checksum"])


def _rhythm(config: Config, counted: cost.Cost, trained: float, steps: int, held_out: Source | None) -> Config:
    """`config` with the updates between held-out accuracies decided; logs what they cost.

    trained: FLOPs of the run's `steps` updates.
    """
    every, data = config.output.validate_every, config.data
    if held_out is None or every == 0:
        return change(config, validate_every=cost.USUAL if every is None else every)
    pairs, encoded = len(held_out) * held_out.sides // counted.sides, of_store(held_out) is not None
    if every is None and config.output.keep_best:
        every = max(1, steps // best.MEASURED)
    elif every is None:
        every = cost.validate_every(counted, config, trained, steps, pairs, encoded=encoded)
    share = cost.validation_share(counted, config, trained, steps, pairs, every=every, encoded=encoded)
    hint = (
        ""
        if share <= cost.SHARE or every >= steps
        else "; a larger --validate-every or fewer --validation-draws cost less"
    )
    log.info(
        "held-out accuracy: %s, %s each, %s: %.2g %% of the run's FLOPs%s",
        number_of(len(held_out), things(held_out)), number_of(data.validation_draws, "draws"),
        "every update" if every == 1 else f"every {every} updates", 100 * share, hint,
    )  # fmt: skip
    return change(config, validate_every=every)


def _held_out(
    config: Config,
    source: Source | None,
    step: PairStep,
    encoder: Encoder,
    compared: Denoise | None,
    processes: Processes,
) -> validation.HeldOut | None:
    """The held-out pairs, encoded, with their reference errors; None where there are none or they are never used."""
    if source is None or not config.output.validate_every:
        return None
    data = config.data
    assert data.resolution is not None, "decided when the model was loaded"
    reading = replace(Reading.of(data), workers=0)
    buckets = find(data, encoder.model.geometry.side_factor, source)
    stream = held_out_batches(
        source, config.optim.batch_size, data.resolution, reading, processes.rank, processes.count, buckets
    )
    return validation.encode_held_out(step, encoder, stream, data.validation_draws, compared, processes)

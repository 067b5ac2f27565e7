"""The work of the prepare command: encoding pairs into a store, and recording the reference's errors on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.common.errors import UserError

log = logging.getLogger("dpo")


PART = "part-{:05d}-of-{:05d}"


SHARD_BYTES = 256 * 2**20  # what a shard should hold


TEXT_BATCH = 32


LARGEST_BATCH = 256  # pairs, the first that is tried for recording on a GPU


def prepare(
    config: Any,
    folder: Path,
    dtype: str = "fp16",
    *,
    shard: tuple[int, int] = (0, 1),
    pairs_per_shard: int | None = None,
    text_batch: int = TEXT_BATCH,
) -> bool:
    """Encodes the pairs that `config` names into `folder`, or process `shard`'s share into a part below it. False: it was done.

    Latents and text are stored in `dtype`; VAE and text encoders compute in the precision that training has. Raises UserError.
    """
    import torch

    from dpo.data.loader import worker_count
    from dpo.data.sources import describe, open_source
    from dpo.data.store import fill
    from dpo.encode import Encoder
    from dpo.models import ready
    from dpo.models.fingerprint import identity
    from dpo.training import embedded

    device = ready.pick_device(config.runtime.device)
    config = embedded.embedded(config)
    if config.data.crop == "random":
        raise UserError("a store holds one crop of each image: --crop random needs the images themselves in every epoch")
    source = open_source(config.data)
    log.info("pairs: %s", describe(source))
    config, model, _, _ = ready.load_model(config, device)
    settings = identity(model) | {
        "resolution": config.data.resolution, "flip": config.data.flip, "dtype": dtype, "precision": config.runtime.precision,
    }  # fmt: skip
    ready.cast(config, model)
    encoder = Encoder(model, device, config.runtime.vae_batch)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    first, last = (len(source) * (shard[0] + i) // shard[1] for i in (0, 1))
    place = folder / PART.format(*shard) if shard[1] > 1 else folder
    fresh = fill.fill(
        fill.Filling(
            folder=place,
            name=str(config.data.data),
            source=source,
            settings=settings,
            encode=Encodings(encoder, kind, config.runtime.vae_batch, text_batch),
            pairs_per_shard=pairs_per_shard or _pairs_per_shard(model, config, kind.itemsize),
            workers=worker_count(config.data.workers),
            bad_image_limit=0.0 if config.data.on_bad_image == "stop" else config.data.bad_image_limit,
            first=first,
            last=last,
            progress=Progress("prepared"),
        )
    )
    log.info("%s: %s", place, "finished" if fresh else "already finished, nothing to do")
    return fresh


@dataclass(frozen=True)
class Encodings:
    """An Encoder's results on the CPU, in the store's dtype."""

    encoder: Any
    dtype: Any
    image_batch: int
    text_batch: int

    def images(self, pixels: Any) -> tuple[Any, Any]:
        mean, std = self.encoder.posterior(pixels)
        return mean.to(self.dtype).cpu(), std.to(self.dtype).cpu()

    def captions(self, captions: list[str]) -> tuple[Any, ...]:
        return tuple(value.to(self.dtype).cpu() for value in self.encoder.text(captions) if value is not None)


def _pairs_per_shard(model: Any, config: Any, itemsize: int) -> int:
    """A power of two that makes shards of about SHARD_BYTES."""
    side = config.data.resolution // model.vae_scale
    pair_bytes = 2 * 2 * model.vae.config.latent_channels * side**2 * itemsize * (2 if config.data.flip else 1)
    return max(16, min(8192, 1 << (SHARD_BYTES // pair_bytes).bit_length() - 1 if pair_bytes < SHARD_BYTES else 16))


def record_reference(
    config: Any,
    folder: Path,
    draws: int,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int | None = None,
    block: int | None = None,
) -> Path:
    """Records the reference's errors on every pair of a finished store in `draws` draws; the record's folder. Raises UserError."""
    import torch

    from dpo.data.batch import Decoding, PairBatch
    from dpo.data.sources import open_source
    from dpo.data.store import recorded, recording
    from dpo.encode import Encoder
    from dpo.models import ready
    from dpo.models.denoiser import halve
    from dpo.models.fingerprint import fingerprint
    from dpo.models.load import load_unet_into
    from dpo.schedule import usable_timesteps
    from dpo.settings.config import change
    from dpo.training import build, embedded, stored

    device = ready.pick_device(config.runtime.device)
    config = change(
        embedded.embedded(config), data=str(folder), data_format="store", ties="keep", max_pairs=None, method="dpo", lora=False
    )
    source = open_source(config.data)
    config, model, plan, _ = ready.load_model(stored.adopt(config, source), device)
    stored.check(model, source)
    ready.cast(config, model)
    if config.model.unet_init and config.model.reference_model == "init":
        load_unet_into(model.denoiser, config.model.unet_init)
    identity = recorded.identity(config.data, config.runtime, plan, fingerprint(model.denoiser))
    precision = config.runtime.precision
    if precision in ready.HALF:
        halve(model.denoiser, ready.HALF[precision])
    unet = ready.settle(change(config, checkpointing="off"), model.denoiser, device)
    step, _ = build.pair_step(config, model, plan, unet, None, device)
    encoder, zero = Encoder(model, device, config.runtime.vae_batch), torch.zeros_like(step.weight)

    def errors(batch: PairBatch) -> torch.Tensor:
        with torch.no_grad():
            return step.errors(encoder.inputs(batch), zero)[0].errors[:2]

    timesteps = usable_timesteps(plan, config.method.window_low, config.method.window_high)
    made_with = {"device": str(device), "torch": torch.__version__, "kernels": config.runtime.kernels, "model": model.source}
    task = recording.Recording(
        contents=source.contents,
        identity=identity,
        timesteps=tuple(timesteps.tolist()),
        made_with=made_with | {"channels_last": config.runtime.channels_last, "compile": config.runtime.compile},
        draws=draws,
        batch_size=batch_size or (LARGEST_BATCH if device.type == "cuda" else config.optim.batch_size),
        errors=errors,
        decoding=Decoding.of(config.data, config.runtime.seed),
        shard=shard,
        block=block or recording.BLOCK_PAIRS,
        progress=Progress("recorded"),
    )
    place, complete = _record_smaller(recording.record, task, halve_it=batch_size is None)
    said = f"{draws} draws of each of {len(source):,} pairs" if complete else "this process is done, others are still at work"
    log.info("reference recorded in %s: %s", place, said)
    return place


def _record_smaller(record: Callable[[Any], Any], task: Any, halve_it: bool) -> Any:
    """Records, with half the batch for as long as the GPU's memory does not hold it."""
    import torch

    while True:
        try:
            return record(task)
        except torch.OutOfMemoryError as error:
            if not halve_it or task.batch_size == 1:
                raise UserError(
                    f"out of GPU memory with {task.batch_size} pairs a batch: give a smaller --record-batch"
                ) from error
        torch.cuda.empty_cache()
        task = replace(task, batch_size=task.batch_size // 2)
        log.info("out of GPU memory: recording %d pairs at a time", task.batch_size)


class Progress:
    """A line in the log now and then: pairs done, pairs per second, time left."""

    def __init__(self, verb: str, every: float = 10.0) -> None:
        self.verb, self.every = verb, every
        self.began = self.said = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done  # what was there, or was done before the clock could tell
        if now - self.said < self.every and done < total:
            return
        self.said = now
        rate = (done - self.first or done) / max(now - self.began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9))) if total > done else "0"
        log.info("%s %s of %s pairs, %.1f pairs/s, %s left", self.verb, f"{done:,}", f"{total:,}", rate, left)

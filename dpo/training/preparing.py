"""The work of the prepare command: encoding pairs into a store, and recording the reference's errors on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dpo.common import locks
from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.data.batch import Decoding, PairBatch
from dpo.data.buckets import find, step_of
from dpo.data.labels import SAME_BYTES, UNREADABLE
from dpo.data.loader import worker_count
from dpo.data.pairs import Source, things
from dpo.data.sources import open_source, tell
from dpo.data.store import fill, recorded, recording
from dpo.data.store.files import read_index
from dpo.data.store.filling import Filling
from dpo.data.store.parts import check_place
from dpo.data.store.store import StoreSource, merge, of_store, read_contents
from dpo.encode import Encoder
from dpo.models.buffers import positions
from dpo.models.denoiser import halve
from dpo.models.family import Model, TextEncoding
from dpo.models.fingerprint import encoders, identity
from dpo.models.ready import HALF, cast, held_narrow, load_model, pick_device, settle
from dpo.schedule import Plan
from dpo.settings.config import Config, Data, Runtime, change
from dpo.step import PairStep
from dpo.training import start, stored
from dpo.training.denoisers import beside, hashes, pair_step
from dpo.training.embedded import embedded
from dpo.training.start import Start

log = logging.getLogger("dpo")


PART = "part-{:05d}-of-{:05d}"


MERGING = 600.0  # seconds that the last processes wait for each other's merging


SHARD_BYTES = 256 * 2**20  # the size that a shard should have


LARGEST_BATCH = 256  # pairs; the first size tried when recording on a GPU


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


Result = TypeVar("Result")


# --- encoding


def encode_pairs(
    config: Config,
    folder: Path,
    dtype: str = "fp16",
    *,
    shard: tuple[int, int] = (0, 1),
    pairs_per_shard: int | None = None,
    text_batch: int,
) -> bool:
    """Encodes the pairs that `config` names into the store `folder`. False when the store already had them.

    shard: (this process, number of processes); with several, each encodes its share into a part below `folder`. Latents
    and text are stored in `dtype`; VAE and text encoders compute in the precision of training. Raises UserError.
    """
    device = pick_device(config.runtime.device)
    config = embedded(config)
    if config.data.crop == "random":
        raise UserError(
            "a store holds one crop of each image: --crop random needs the images themselves in every epoch"
        )
    if shard[1] > 1:
        check_place(folder)  # the last process merges
    source = open_source(config.data)
    if of_store(source) is not None:
        raise UserError(
            f"--data {config.data.data} is a prepared store, which keeps no images: name the pairs it was made from, or make one "
            "store of several with --merge"
        )
    tell(source)
    config, model, _, _ = load_model(config, device, narrow=held_narrow(config, device), without_denoiser=True)
    settings = (
        identity(model)
        | encoders(model)
        | {  # before the weights are cast: the identity is that of the stored model
            "resolution": config.data.resolution,
            "flip": config.data.flip,
            "dtype": dtype,
            "precision": _encoded_in(config.runtime),
        }
        | positions(config.runtime.precision, *model.text_encoders)
        | ({} if source.sides == 2 else {"sides": source.sides})
    )
    if config.data.buckets:
        assert config.data.resolution is not None, "decided when the model was loaded"
        shape = model.geometry
        settings |= {"buckets": step_of(config.data.resolution, shape.side_factor), "vae_scale": shape.vae_scale}
    cast(model, config.runtime.precision, config.runtime.vae_precision)
    first, last = (len(source) * (shard[0] + i) // shard[1] for i in (0, 1))
    log.info("%s", _size_told(model, config, source, slice(first, last), DTYPES[dtype].itemsize))
    place = folder / PART.format(*shard) if shard[1] > 1 else folder
    images = config.runtime.vae_batch
    task = Filling(
        folder=place,
        name=str(config.data.data),
        source=source,
        settings=settings,
        encode=Encodings(Encoder(model, device, images), DTYPES[dtype], images, text_batch),
        pairs_per_shard=pairs_per_shard or _pairs_per_shard(model, config.data, DTYPES[dtype].itemsize),
        workers=worker_count(config.data.workers),
        bad_image_limit=config.data.bad_image_limit,
        stop_at_bad=config.data.on_bad_image == "stop",
        first=first,
        last=last,
        beside=[other for i in range(shard[1]) if (other := folder / PART.format(i, shard[1])) != place],
        max_mib=config.data.max_image_mib,
        progress=progress_line("prepared", things(source)),
    )
    with locks.held(place, "--store"):
        fresh = fill.fill(task)
    if task.cut.images:
        log.info("buckets: %s", task.cut.told())
    log.info("%s: %s", place, f"finished, {_pairs_in(place)}" if fresh else "already finished, nothing to do")
    return fresh


def _pairs_in(folder: Path) -> str:
    """How many pairs a store has, and how many of them cannot be used, in words."""
    contents = read_contents(folder)
    holes = sum(contents.summary.get(name, 0) for name in (UNREADABLE, SAME_BYTES))
    return f"{len(contents.order) - holes:,} {things(StoreSource(contents, contents.order, 0.0))}" + (
        f"; left out: {holes:,}" if holes else ""
    )


def _encoded_in(runtime: Runtime) -> str:
    """The precision that all parts of a store were encoded in, in words."""
    own = runtime.vae_precision
    return runtime.precision if own == "auto" else f"{runtime.precision}, VAE {own}"


@dataclass
class Encodings:
    """An Encoder's results on the CPU, in the store's dtype."""

    encoder: Encoder
    dtype: torch.dtype
    image_batch: int
    text_batch: int

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] uint8 -> mean and std of the VAE's posterior [N, C, h, w]."""
        mean, std = self.encoder.posterior(pixels)
        return mean.to(self.dtype).cpu(), std.to(self.dtype).cpu()

    def captions(self, captions: list[str]) -> TextEncoding:
        """N captions -> their encoding [N, ...]."""
        return self.encoder.text(captions).to("cpu", self.dtype)


def _pairs_per_shard(model: Model, data: Data, itemsize: int) -> int:
    """The power of two, from 16 to 8192, that makes shards of about SHARD_BYTES, captions not counted."""
    pair_bytes = 2 * _image_bytes(model, data, itemsize)
    return max(16, min(8192, 1 << (SHARD_BYTES // pair_bytes).bit_length() - 1 if pair_bytes < SHARD_BYTES else 16))


def _image_bytes(model: Model, data: Data, itemsize: int) -> int:
    """Bytes of an image in a store: mean and deviation of its latents, once more where it is mirrored."""
    assert data.resolution is not None, "decided when the model was loaded"
    shape = model.geometry
    return 2 * shape.channels * (data.resolution // shape.vae_scale) ** 2 * itemsize * (2 if data.flip else 1)


def _caption_bytes(model: Model, itemsize: int) -> int:
    """Bytes of a caption's encoding in a store, at most: one with a mask is kept without its padding."""
    flow = model.family.flow
    text = model.family.encode(model, [""]) if flow is None else flow.blank(model)
    return sum(x.numel() * itemsize for x in (text.hidden, text.pooled) if x is not None)


def _size_told(model: Model, config: Config, source: Source, rows: slice, itemsize: int) -> str:
    """What the pairs `rows` of a source take in a store, in words, before any of them is encoded."""
    captions = len(np.unique(source.caption_keys()[rows])) + 1  # the empty one
    images = source.sides * len(range(len(source))[rows])
    caption, image = _caption_bytes(model, itemsize), _image_bytes(model, config.data, itemsize)
    total = captions * caption + images * image
    return (
        f"store: a caption takes {caption / 2**20:.2f} MiB and an image {image / 2**20:.2f} MiB; {captions:,} captions and "
        f"{images:,} images take at most {total / 1e9:.3g} GB"
    )


def is_embedded(folder: Path) -> bool:
    """Whether a store, or what is prepared of it, holds the pairs of the small world inside the package alone."""
    from dpo.tiny.paths import ASSETS, train_pairs_path

    end = train_pairs_path().relative_to(ASSETS.parent).parts  # the package may have moved
    sources = (read_index(folder) or {}).get("sources", [])
    return bool(sources) and all(Path(source["name"]).parts[-len(end) :] == end for source in sources)


def parts_in(folder: Path) -> list[Path]:
    """The parts that several processes made below `folder`. Raises UserError when some are missing."""
    found = sorted(folder.glob("part-*-of-*"))
    if not found:
        raise UserError(f"{folder} has no parts: name the stores to merge after --merge")
    count = int(found[0].name.rsplit("-", 1)[1])
    wanted = [folder / PART.format(i, count) for i in range(count)]
    missing = [part.name for part in wanted if part not in found]
    if missing or len(found) != count:
        raise UserError(
            f"{folder}: {', '.join(missing) or 'parts of several numberings'}: prepare the missing shards, then --merge"
        )
    return wanted


def merge_when_complete(folder: Path, count: int) -> bool:
    """Merges the parts of `count` processes into `folder`; False while some are not finished."""
    parts = [folder / PART.format(i, count) for i in range(count)]
    if not all((index := read_index(part)) is not None and index["finished"] for part in parts):
        log.info("this part is done; %s becomes a store when the others are", folder)
        return False
    with locks.held(folder, "--store", wait=MERGING):
        merge(folder, parts)
    log.info("%s: %d parts merged", folder, count)
    return True


# --- recording


def record_reference(
    config: Config,
    folder: Path,
    draws: int,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int | None = None,
    block: int | None = None,
) -> Path:
    """Records the reference's errors on every pair of a finished store, in `draws` draws; the record's folder.

    shard: (this process, number of processes); batch_size: pairs, None for as many as fit; block: pairs written at
    once. Raises UserError.
    """
    device = pick_device(config.runtime.device)
    config = change(
        embedded(config), data=str(folder), data_format="store", ties="keep", max_pairs=None, method="dpo", lora=False
    )
    source = open_source(config.data)
    config = stored.adopt(config, source)
    config, model, plan, _ = load_model(config, device, narrow=held_narrow(config, device, frozen=True))
    stored.check(model, source)
    store = of_store(source)
    assert store is not None, "opened as one"
    config, begin, told = start.read(config, model)
    for line in told:
        log.info("%s", line)
    weights, step = _reference_step(config, model, plan, device, begin)
    timesteps = step.timesteps.cpu()
    zeros = config.data.dropped_caption == "zeros"
    encoder = Encoder(model, device, config.runtime.vae_batch, zero_dropped=zeros)
    task = recording.Recording(
        contents=store.contents,
        identity=recorded.identity(config.data, config.runtime, plan, weights[0], beside(config, model)),
        checksum=weights[1],
        timesteps=tuple(timesteps.tolist()),
        made_with=_made_with(config.runtime, model, device),
        draws=draws,
        batch_size=batch_size or (LARGEST_BATCH if device.type == "cuda" else config.optim.batch_size),
        errors=_errors_of(step, encoder),
        decoding=Decoding.of(config.data, config.runtime.seed),
        shard=shard,
        block=block or recording.BLOCK_PAIRS,
        sizes=buckets.sizes if (buckets := find(config.data, model.geometry.side_factor, source)) else (),
        progress=progress_line("recorded", f"draws of {things(source)}"),
    )
    with locks.held(folder, "--store", "-{}-of-{}".format(*shard) if shard[1] > 1 else ""):
        place, complete = _record_smaller(recording.record, task, halve_it=batch_size is None)
    said = (
        f"{draws} draws of each of {len(source):,} {things(source)}"
        if complete
        else "this process is done, others are still at work"
    )
    log.info("reference recorded in %s: %s", place, said)
    return place


def _reference_step(
    config: Config, model: Model, plan: Plan, device: torch.device, begin: Start
) -> tuple[tuple[str, str], PairStep]:
    """The reference's fingerprint and checksum, and its forward in the precision and layout of training."""
    precision = config.runtime.precision
    cast(model, precision, frozen=True)
    if config.model.reference_model == "init":
        begin.put(model)
    weights = hashes("reference", model.denoiser, precision)
    if precision in HALF:
        halve(model.denoiser, HALF[precision])
    reference = model.denoise(settle(replace(config.runtime, checkpointing="off"), model.denoiser, device))
    step, _ = pair_step(config, model, plan, reference, None, device)
    return (weights["reference"], weights["reference_checksum"]), step


def _errors_of(step: PairStep, encoder: Encoder) -> Callable[[PairBatch], Tensor]:
    """A function from a batch to the reference's errors [2, B], win and lose."""
    zero = torch.zeros_like(step.weight)

    @torch.no_grad()
    def errors(batch: PairBatch) -> Tensor:
        return step.errors(encoder.inputs(batch), zero)[0].errors[:2]

    return errors


def _made_with(runtime: Runtime, model: Model, device: torch.device) -> dict[str, Any]:
    """What a record was made with, for people to read."""
    return {
        "device": str(device),
        "torch": torch.__version__,
        "kernels": runtime.kernels,
        "model": model.source,
        "channels_last": runtime.channels_last,
        "compile": runtime.compile,
    }


def _record_smaller(
    record: Callable[[recording.Recording], Result], task: recording.Recording, halve_it: bool
) -> Result:
    """Records; with `halve_it` it tries again with half the batch while the GPU's memory is too small.

    Raises UserError.
    """
    while True:
        try:
            return record(task)
        except torch.OutOfMemoryError as error:
            if not halve_it or task.batch_size == 1:
                raise UserError(
                    f"out of GPU memory with {number_of(task.batch_size, 'pairs')} a batch"
                    + (": give a smaller --record-batch" if task.batch_size > 1 else ": use a GPU with more memory")
                ) from error
        torch.cuda.empty_cache()
        task = replace(task, batch_size=task.batch_size // 2)
        log.info("out of GPU memory: recording %s at a time", number_of(task.batch_size, "pairs"))


def progress_line(verb: str, unit: str = "pairs", every: float = 10.0) -> Callable[[int, int], None]:
    """A function (done, in all) that logs both, in `unit`, the speed and the time left, every `every` seconds."""
    began = said = time.monotonic()
    first: int | None = None

    def say(done: int, total: int) -> None:
        nonlocal said, first
        now = time.monotonic()
        if first is None:
            first = done  # not timed: done by an earlier process, or before this first call
        if now - said < every and done < total:
            return
        said = now
        rate = (done - first or done) / max(now - began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9))) if total > done else "0"
        log.info("%s %s of %s %s, %.1f a second, %s left", verb, f"{done:,}", f"{total:,}", unit, rate, left)

    return say

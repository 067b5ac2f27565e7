"""Prepare once, train many times: encode pairs into a store, and record the reference's errors on them.

    python -m dpo.prepare --store STORE --model MODEL --data PAIRS                  encode every image and caption once
    python -m dpo.prepare --store STORE --model MODEL --reference --draws 4         record the reference's errors
    python -m dpo.prepare --store STORE --verify                                    check every byte

Then `python -m dpo.train --model MODEL --data STORE --reference recorded`. Killed at any moment, the same command goes on.
The flags of dpo.train that decide how pairs are read and encoded, or what the reference is, are accepted too: give the same ones.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.errors import UserError

DTYPES = ("fp16", "bf16", "fp32")
PART = "part-{:05d}-of-{:05d}"
SHARD_BYTES = 256 * 2**20  # what a shard should hold
TEXT_BATCH = 32
LARGEST_BATCH = 256  # pairs, the first that is tried for recording on a GPU

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when all is done, 1 when --verify found damage, 2 after a mistake of the user's, 130 when interrupted."""
    from dpo import console

    try:
        own, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
        console.setup()
        return run(own, rest)
    except UserError as error:
        print(f"dpo.prepare: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        log.warning("stopped; the same command goes on from here")
        return 130


def run(own: argparse.Namespace, rest: list[str]) -> int:
    """What the command line asks for; `rest` are flags of dpo.train."""
    from dpo import record
    from dpo.data import store

    folder = Path(own.store).expanduser()
    if own.verify:
        if not store.is_store(folder):
            raise UserError(f"{folder}: no prepared store is there, so there is nothing to check")
        wrong = store.verify(folder) + record.verify(folder)
        for line in wrong:
            log.error("%s", line)
        count = f"{len(wrong)} {'file is' if len(wrong) == 1 else 'files are'} damaged"
        log.info("%s: %s", folder, count if wrong else "every checksum is right")
        return 1 if wrong else 0
    if own.merge is not None:
        parts = [Path(part).expanduser() for part in own.merge] or parts_in(folder)
        store.merge(folder, parts)
        log.info("%s: %d parts, %s pairs", folder, len(parts), f"{len(store.read_contents(folder).key):,}")
        return 0
    shard = shard_of(own.shard)
    config = _config(folder, rest)
    if config.data.data != str(folder):
        prepare(config, folder, own.dtype, shard=shard, pairs_per_shard=own.pairs_per_shard, text_batch=own.text_batch)
        if shard[1] > 1 and not _merge_when_complete(folder, shard[1]):
            return 0
    if own.reference:
        record_reference(config, folder, own.draws, shard=shard, batch_size=own.record_batch)
    return 0


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

    from dpo import build, prepared
    from dpo.data import describe, filling, open_source
    from dpo.data.loader import worker_count
    from dpo.step import Encoder

    device = build.pick_device(config.runtime.device)
    config = build.embedded(config)
    if config.data.crop == "random":
        raise UserError("a store holds one crop of each image: --crop random needs the images themselves in every epoch")
    source = open_source(config.data)
    log.info("pairs: %s", describe(source))
    config, model, _, _ = build.load_model(config, device)
    settings = prepared.identity(model) | {
        "resolution": config.data.resolution, "flip": config.data.flip, "dtype": dtype, "precision": config.runtime.precision,
    }  # fmt: skip
    build.cast(config, model)
    encoder = Encoder(model, device, config.runtime.vae_batch)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    first, last = (len(source) * (shard[0] + i) // shard[1] for i in (0, 1))
    place = folder / PART.format(*shard) if shard[1] > 1 else folder
    fresh = filling.fill(
        filling.Task(
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

    from dpo import build, prepared, record
    from dpo.config import change
    from dpo.data import open_source
    from dpo.models.load import fingerprint, load_unet_into
    from dpo.models.unet import halve
    from dpo.schedule import usable_timesteps
    from dpo.step import Encoder

    device = build.pick_device(config.runtime.device)
    config = change(
        build.embedded(config), data=str(folder), data_format="store", ties="keep", max_pairs=None, method="dpo", lora=False
    )
    source = open_source(config.data)
    config, model, plan, _ = build.load_model(prepared.adopt(config, source), device)
    prepared.check(model, source)
    build.cast(config, model)
    if config.model.unet_init and config.model.reference_model == "init":
        load_unet_into(model.unet, config.model.unet_init)
    identity = record.identity(config, plan, fingerprint(model.unet))
    precision = config.runtime.precision
    if precision in build.HALF:
        halve(model.unet, build.HALF[precision])
    unet = build.settle(change(config, checkpointing="off"), model.unet, device)
    step, _ = build.pair_step(config, model, plan, unet, None, device)
    encoder, zero = Encoder(model, device, config.runtime.vae_batch), torch.zeros_like(step.weight)

    def errors(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return step(encoder.inputs(batch), zero)[0].errors[:2]

    timesteps = usable_timesteps(plan, config.method.window_low, config.method.window_high)
    made_with = {"device": str(device), "torch": torch.__version__, "kernels": config.runtime.kernels, "model": model.source}
    task = record.Task(
        contents=source.contents,
        identity=identity,
        timesteps=tuple(timesteps.tolist()),
        made_with=made_with | {"channels_last": config.runtime.channels_last, "compile": config.runtime.compile},
        draws=draws,
        batch_size=batch_size or (LARGEST_BATCH if device.type == "cuda" else config.optim.batch_size),
        errors=errors,
        config=config,
        shard=shard,
        block=block or record.BLOCK,
        progress=Progress("recorded"),
    )
    place, complete = _record_smaller(record.record, task, halve_it=batch_size is None)
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


# ------------------------------------------------------------------------------------------------------------ command line


def _parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(message)

    parser = Parser(
        prog="dpo.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of python -m dpo.train are understood as well.",
    )
    parser.add_argument("--store", required=True, metavar="FOLDER", help="the prepared store, made or added to")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the stored latents and text (default: fp16)")
    parser.add_argument("--reference", action="store_true", help="record the reference's errors too")
    parser.add_argument(
        "--draws", type=_positive, default=4, metavar="K", help="draws of (timestep, noise) per pair (default: 4)"
    )
    parser.add_argument(
        "--record-batch",
        type=_positive,
        metavar="N",
        help="pairs a batch when recording (default: as many as fit; on a CPU --batch-size)",
    )
    parser.add_argument("--shard", metavar="I/N", help="be process I of N (default: from torchrun's environment, else 0/1)")
    parser.add_argument(
        "--merge", nargs="*", metavar="PART", help="make the store an index over finished parts (default: those below it)"
    )
    parser.add_argument("--verify", action="store_true", help="check every byte of the store and its records")
    parser.add_argument("--pairs-per-shard", type=_positive, metavar="N", help="pairs in one file (default: about 256 MiB)")
    parser.add_argument(
        "--text-batch", type=_positive, default=TEXT_BATCH, metavar="N", help="captions encoded at once (default: 32)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _config(folder: Path, rest: list[str]) -> Any:
    """The settings of the flags of dpo.train; without --data, a store that is there is what is recorded on."""
    from dpo.cli import parse
    from dpo.data.store import is_store

    names = {word.split("=")[0].replace("_", "-") for word in rest}
    named = names & {"--data", "--dataset-name", "--train-data-dir", "--config", "--preset"}
    if not named and is_store(folder):
        if not names & {"--model", "--pretrained-model-name-or-path"}:
            raise UserError(f"{folder} is a store: give the --model that it was prepared with")
        rest = [*rest, "--data", str(folder)]
    config, notes = parse(rest, also=[flag for action in _parser()._actions for flag in action.option_strings])
    for note in notes:
        log.info("%s", note)
    return config


def shard_of(text: str | None) -> tuple[int, int]:
    """(process, processes) from "I/N", else from torchrun's environment."""
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N-1, such as 0/4")
    return int(found[1]), int(found[2])


def parts_in(folder: Path) -> list[Path]:
    """The parts that sharded processes made below `folder`. Raises UserError when some are missing."""
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


def _merge_when_complete(folder: Path, count: int) -> bool:
    """Merges once every process is done; False while some are not."""
    from dpo.data import store
    from dpo.data.shards import read_index

    parts = [folder / PART.format(i, count) for i in range(count)]
    if not all((index := read_index(part)) is not None and index["finished"] for part in parts):
        log.info("this part is done; %s becomes a store when the others are", folder)
        return False
    store.merge(folder, parts)
    log.info("%s: %d parts merged", folder, count)
    return True


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


if __name__ == "__main__":
    sys.exit(main())

"""What a run takes from a prepared store, and whether the store fits the model, and labels the loss."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import command_line, counted, listed, number_of
from dpo.data.batch import PairBatch
from dpo.data.pairs import Source
from dpo.data.store import recorded
from dpo.data.store.files import NOT_ALWAYS
from dpo.data.store.store import is_store, of_store
from dpo.encode import Encoder
from dpo.methods import METHODS
from dpo.models.buffers import EXACT, positions
from dpo.models.family import Model
from dpo.models.fingerprint import encoders, identity
from dpo.models.ready import facts_of, pick_device
from dpo.settings.config import Config, change, flatten, specs
from dpo.settings.resolve import DeviceFacts, precision_of
from dpo.step import PairStep
from dpo.training.embedded import embedded

log = logging.getLogger("dpo")

# What a record depends on, besides the settings of the model.
RECORDED_WITH = (*recorded.FLAGS, "window_low", "window_high", "logit_mean", "logit_std")
NAMES = {
    "family": "model family",
    "vae": "VAE",
    "text_encoders": "text encoder",
    "tokenizers": "tokenizer",
    "encoders": "VAE or text encoder",
}


def adopt(config: Config, source: Source) -> Config:
    """`config` with the resolution and the length of captions of the prepared store, where the pairs are in one."""
    store = of_store(source)
    if store is None:
        return config
    held = store.contents.settings
    return change(
        config,
        data_format="store",
        resolution=config.data.resolution or held["resolution"],
        text_tokens=config.model.text_tokens or held.get("text_tokens"),
    )


def check(model: Model, *sources: Source | None) -> None:
    """Raises UserError when a source is a store that was encoded with other encoders than `model`'s."""
    stores = [store for source in sources if source is not None and (store := of_store(source)) is not None]
    own = identity(model) | encoders(model) if stores else {}
    for store in stores:
        precision = str(store.contents.settings.get("precision", ""))
        for name, value in (own | positions(precision, *model.text_encoders)).items():
            there = store.contents.settings.get(name)
            if there is None and name in EXACT:
                raise UserError(
                    f"{store.contents.folder} was prepared in {precision} by an earlier version, which rounded the positions in the text "
                    f"encoder of {model.source} as well: prepare another store"
                )
            if there != value and name == "text_tokens":
                raise UserError(
                    f"{store.contents.folder} was prepared with --text-tokens {there}, now it is {value}: leave it out, or prepare "
                    "another store"
                )
            if there != value and not (there is None and name in NOT_ALWAYS):
                raise UserError(
                    f"{store.contents.folder} was prepared with another {NAMES[name]} than {model.source} has: "
                    "name that model, or prepare a store with this one"
                )


def check_resolution(source: Source | None, resolution: int | None) -> None:
    """Raises UserError when `source`, of the held-out pairs, is a store of another resolution than the run's."""
    store = None if source is None else of_store(source)
    if store is not None and (there := store.contents.settings["resolution"]) != resolution:
        raise UserError(
            f"{store.contents.folder} holds images of {there} pixels, and the run trains at {resolution}: prepare the held-out pairs "
            f"with --resolution {resolution}"
        )


def check_records(configs: Sequence[Config]) -> None:
    """Raises UserError where some of these runs, all of one store and model, want recorded errors that the store lacks.

    As far as that is known before the model is loaded; `recorded.find` asks for all of it.
    """
    given = embedded(configs[0])
    folder = Path(str(given.data.data)).expanduser()
    if not is_store(folder):
        raise UserError(recorded.NO_STORE)
    device = facts_of(pick_device(given.runtime.device))
    settings = [flatten(config) for config in configs]
    varied = [name for name in recorded.FLAGS if len({one[name] for one in settings}) > 1] or ["seed"]
    lacks: dict[str, tuple[str, Config]] = {}
    for config, asked in zip(configs, settings, strict=True):
        if why := recorded.lacking(folder, _known(config, device)):
            lacks.setdefault(" ".join(f"{recorded.FLAGS[name]} {asked[name]}" for name in varied), (why, config))
    if lacks:
        why, first = next(iter(lacks.values()))
        make = "make one of each before, the first" if len(lacks) > 1 else "make it before,"
        raise UserError(
            f"no recorded reference in {folder} suits the runs with {listed(lacks)} ({why}): {make} with "
            f"{_recording(folder, first)}"
        )


def _known(config: Config, device: DeviceFacts) -> dict[str, Any]:
    """What of a run's `recorded.identity` is known before its model is loaded."""
    found = recorded.asked(config.data, config.runtime)
    found["precision"], other = (precision_of(found["precision"], device, flow=flow) for flow in (False, True))
    if found["precision"] != other:  # the model decides
        del found["precision"]
    return found


def _recording(folder: Path, config: Config) -> str:
    """The command that records in the store in `folder` what a run of these settings wants."""
    settings, words = flatten(config), ["dpo.prepare", "--store", str(folder), "--reference"]
    for spec in specs().values():
        value = settings[spec.name]
        if (spec.group == "model" or spec.name in RECORDED_WITH) and (value != spec.default or spec.name == "seed"):
            words += [spec.flag] if value is True else [spec.flag, str(value)]
    return command_line(words)


def check_sides(config: Config, source: Source, held_out: Source | None) -> None:
    """Raises UserError where the method compares pairs and there are none, or pairs are trained on and none are held out.

    Says how many images without a partner are liked, and warns where all are, or none.
    """
    data, method = config.data, config.method.method
    if held_out is not None and held_out.sides < source.sides:
        raise UserError(
            f"{data.data} has pairs and {data.validation_data} has images without partners, whose accuracy needs a centre that "
            "pairs do not have: hold out pairs"
        )
    if source.sides == 2:
        return
    if (images := METHODS[method].images) != "single":
        does = "compares the two of a pair" if images == "pair" else "trains on the preferred image of a pair"
        names = listed(sorted(name for name, row in METHODS.items() if row.images == "single"))
        raise UserError(
            f"{data.data} has images without partners, and method {method} {does}: use --method {names}, or give pairs"
        )
    liked = int(np.sum(source.prob > 0.5))
    are = counted(liked, "image is", "images are"), counted(len(source) - liked, "is", "are")
    log.info("labels: %s liked, %s not", *are)
    if held_out is not None and held_out.sides == 1:
        out = int(np.sum(held_out.prob > 0.5))
        log.info(
            "held-out accuracy is the share of images whose gain over the centre has the sign of their label, the mean of that of "
            "the %d liked ones and that of the %d others: one answer for all gives one half",
            out, len(held_out) - out,
        )  # fmt: skip
    if liked in (0, len(source)):
        log.warning(
            "%s of the %d images is liked: with labels of one kind nothing says what to prefer, and KTO moves the model by "
            "them alone", "none" if not liked else "each", len(source),
        )  # fmt: skip


def check_labels(config: Config, source: Source) -> None:
    """Raises UserError where the loss reads how sure labels are and none says so."""
    if config.method.loss == "smpo" and not np.any((source.prob > 0.5) & (source.prob < 1)):
        raise UserError(
            f"--loss smpo scales each pair by how sure its label is, and all labels of {config.data.data} are sure, which is "
            "--loss sigmoid with a larger --beta: use that, or pairs with a column p (python -m dpo.label makes one)"
        )


MEASURED = 4  # micro-batches on which the noise of the logit is measured


def step_zero(step: PairStep, encoder: Encoder, stream: Generator[PairBatch, None, None]) -> str:
    """A log line on the largest logit before the first update, the policy running as in training.

    Where it is not 0 the line says which switch leaves out what rounds otherwise with a gradient than without.
    """
    z, pairs = _logits(step, encoder, stream, graded=True)
    largest = float(z.abs().max()) if z.numel() else 0.0
    text = f"step 0: {number_of(pairs, 'pairs')}, largest |logit| {largest:.2g}"
    if not largest:
        return text
    return (
        f"{text}, of a logit that training moves by 1 or more: the forward pass rounds otherwise with a gradient than without; "
        "--deterministic leaves out the attentions that may"
    )


def _logits(
    step: PairStep, encoder: Encoder, stream: Generator[PairBatch, None, None], *, graded: bool
) -> tuple[Tensor, int]:
    """Logits of the usable pairs of the first micro-batches, in float64, without a correction; closes the stream.

    With them the number of pairs, of which a small set has several epochs there.
    """
    zero = torch.zeros_like(step.weight)
    logits, pairs = [], set[int]()
    for batch in islice(stream, MEASURED):
        with torch.set_grad_enabled(graded):
            found, _ = step.errors(encoder.inputs(batch), zero, recorded=batch.recorded)
        logits.append(found.logit.detach()[batch.usable.to(zero.device) > 0])
        pairs |= set(batch.keys[batch.usable > 0].tolist())
        del found  # and with it what was kept for a backward pass
    stream.close()
    return torch.cat(logits).double(), len(pairs)


def noise(
    step: PairStep, encoder: Encoder, stream: Generator[PairBatch, None, None], cause: str, *, graded: bool = False
) -> str:
    """A log line on how far the logit is from 0 before the first update, where policy and reference are the same.

    cause: what may move it, in words. graded: the policy runs as in training, with what a backward pass needs.
    """
    z, count = _logits(step, encoder, stream, graded=graded)
    first = "first pair" if count == 1 else f"first {count} pairs"
    if not z.numel() or not bool(z.any()):
        return f"the logit of the {first} is exactly 0"
    sd, largest = float(z.square().mean().sqrt()), float(z.abs().max())
    text = f"noise on the logit of the {first}: sd {sd:.2g}, largest {largest:.2g}"
    return f"{text} ({cause})"

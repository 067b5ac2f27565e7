"""A LoRA from two models: the best approximation, layer by layer, of what an aligned denoiser changed in its base."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo.common.console import Progress
from dpo.common.errors import UserError
from dpo.exporting import adapters, pieces, spec
from dpo.exporting.difference import Change, decompose, rounding
from dpo.exporting.sources import Side, check_alike, check_start, coarser, opened
from dpo.models.adapter import Adapter, Factors
from dpo.models.original import attended, resnets_of, unet_layer
from dpo.models.ready import pick_device

log = logging.getLogger("dpo")

HELD = re.compile(  # with two dimensions or more: what every reader knows
    r"(down_blocks|mid_block|up_blocks|(\w+_)?transformer_blocks)\..+\.weight"
)
LINES = 5  # of progress, where there is no terminal
SHARES = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Asked:
    """What to extract, from what."""

    aligned: str
    base: str
    output: Path
    rank: int | None = None  # of every layer, as far as it has so much; None: by `energy`
    energy: float | None = None  # least share of a layer's squared change that is kept
    max_rank: int = 128  # with `energy`
    kohya: bool = False  # names of sd-scripts instead of diffusers'
    fp16: bool = False
    device: str = "auto"
    cache_dir: str | None = None


class Row(NamedTuple):
    """What became of one layer."""

    layer: str
    shape: tuple[int, ...]
    relative: float  # length of the change over that of the base's weight
    ranks: tuple[int, ...]  # for each of SHARES
    rank: int  # kept
    kept: float  # share of the squared change
    squared: float  # of the change
    floor: float  # the expected length of rounding alone over that of the change


class Extraction(NamedTuple):
    """A LoRA, and what it holds."""

    path: Path
    rows: list[Row]
    left: dict[str, float]  # what is left out -> squared change
    total: float  # squared change of the whole denoiser

    @property
    def kept(self) -> float:
        """The share of the denoiser's squared change that the LoRA holds."""
        return sum(row.kept * row.squared for row in self.rows) / self.total


def extract(asked: Asked) -> Extraction:
    """Writes the LoRA that is asked for. Raises UserError for two models that differ in more than the denoiser's weights."""
    device = pick_device(asked.device)
    aligned, base = opened(asked.aligned, asked.cache_dir), opened(asked.base, asked.cache_dir)
    if base.flow is not None and asked.kohya:
        raise UserError(f"--lora-format kohya: sd-scripts has no such names for family {base.family}; use diffusers")
    exact = check_alike(aligned, base)  # the base is what was trained from, to the bit: its own rounding is no change
    check_start(aligned, base)
    rows: list[Row] = []
    adapter: Adapter = {}
    left: defaultdict[str, float] = defaultdict(float)
    total = 0.0
    with Progress(len(base.denoiser), lambda _: [], log_every=len(base.denoiser) // LINES + 1, unit="weight") as bar:
        for count, name in enumerate(base.denoiser, 1):
            before = base.denoiser[name].make().to(device, torch.float64)
            change = aligned.denoiser[name].make().to(device, torch.float64) - before
            squared = float(change.square().sum())
            if not squared < float("inf"):
                raise UserError(f"{name} has NaN or infinity in one of the models: it is damaged")
            total += squared
            if squared and change.dim() > 1 and HELD.fullmatch(name):
                layer = name.removesuffix(".weight")
                found = decompose(change)
                stored = aligned.denoiser[name].dtype
                row = _row(asked, layer, before, found, stored if exact else coarser(stored, base.denoiser[name].dtype))
                rows.append(row)
                adapter[layer] = _factors(found, row)
            elif squared:
                left[_kind(name, change.dim())] += squared
            bar.update(count, {})
    if not rows:
        what = f"only in what the LoRA leaves out ({', '.join(left)})" if left else "in nothing"
        raise UserError(f"{asked.aligned} and --base {asked.base} differ {what}: there is nothing to extract")
    _write(asked, adapter, aligned, base)
    return Extraction(asked.output, rows, dict(sorted(left.items(), key=lambda item: -item[1])), total)


def _row(asked: Asked, layer: str, before: Tensor, found: Change, dtype: torch.dtype) -> Row:
    most = len(found.energies)
    wanted = asked.rank if asked.energy is None else min(found.rank_of(asked.energy), asked.max_rank)
    rank = min(wanted or 1, most)
    return Row(
        layer=layer,
        shape=tuple(before.shape),
        relative=(found.total / max(float(before.square().sum()), 1e-300)) ** 0.5,
        ranks=tuple(found.rank_of(share) for share in SHARES),
        rank=rank,
        kept=found.kept(rank),
        squared=found.total,
        floor=(rounding(before, dtype) / found.total) ** 0.5,
    )


def _factors(found: Change, row: Row) -> Factors:
    down, up = (part.cpu() for part in found.factors(row.rank))
    shape = (row.rank, *row.shape[1:])
    return Factors(down.view(shape), up.view(row.shape[0], row.rank, *[1] * (len(row.shape) - 2)), float(row.rank))


def _kind(name: str, dimensions: int) -> str:
    """What a weight that is left out is called."""
    if name.endswith(".bias"):
        return "biases"
    return "norms" if dimensions < 2 else name.removesuffix(".weight")


def _write(asked: Asked, adapter: Adapter, aligned: Side, base: Side) -> None:
    names = base.denoiser
    name_of = partial(unet_layer, layers=resnets_of(names), attended=attended(names))
    kohya_name = (name_of if base.family == "sdxl" else str) if asked.kohya else None
    tensors, told = adapters.named(adapter, "unet" if base.flow is None else base.flow.denoiser, kohya_name)
    turbo = aligned.turbo or base.turbo
    known = base.known()._replace(scheduler=aligned.scheduler, turbo=turbo, side=aligned.side)
    header = spec.metadata(known, asked.output.stem, _folder(asked.aligned), lora=True, original=asked.kohya) | told
    pieces.write(asked.output, pieces.of_tensors(tensors), header, fp16=asked.fp16)


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def noisy(rows: Sequence[Row], energy: float) -> list[Row]:
    """The layers in whose change rounding has a larger share than may be left out: higher ranks hold noise there."""
    return [row for row in rows if row.floor**2 > 1 - energy]

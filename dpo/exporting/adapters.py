"""A LoRA handed on: its tensors under the names that other programs read, and the network that they belong to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo.common.errors import UserError
from dpo.exporting.pieces import of_file
from dpo.exporting.spec import V2, Known, architecture
from dpo.models import adapter as lora
from dpo.models.adapter import Adapter, Factors
from dpo.models.family import Model
from dpo.models.single_file import said_by
from dpo.planning.sketch import CONFIGS, sketch
from dpo.settings.config import Model as Named

SHIPPED = {768: "sd15", 1024: "sd21", 2048: "sdxl"}  # width of the text -> configs in the package
CROSS = ".transformer_blocks.0.attn2.to_k.weight"


def by_size(named: Named) -> bool:
    """Whether the network of a model is known by the size of its one file alone, which no configs describe."""
    return named.single_file_config is None and Path(named.model or "").expanduser().is_file()


def network_of(named: Named) -> Model:
    """The model that the settings name, on the meta device: no weights are read. Raises UserError.

    Of one file its scheduler, and whether it is Turbo, is what that says of itself; where it is known `by_size`, and says no
    target, none is told.
    """
    path = Path(named.model or "").expanduser()
    if named.timesteps == "auto":  # a name that says Turbo matters in training
        named = replace(named, timesteps="all")
    guessed = by_size(named)
    if guessed:
        widths = [piece.shape[1] for name, piece in of_file(path).items() if name.endswith(CROSS)]
        if not widths or widths[0] not in SHIPPED:
            raise UserError(
                f"{path} has the size of no published model: name a diffusers folder of the same architecture "
                "with --lora-base"
            )
        named = replace(named, single_file_config=str(CONFIGS / SHIPPED[widths[0]]))
    model = sketch(named)
    if not path.is_file():
        return model
    without = {"prediction_type"} if guessed else set()
    described = {key: value for key, value in model.scheduler_config.items() if key not in without}
    said = said_by(path, model.family)
    return replace(model, scheduler_config=described | said.scheduler, turbo=model.turbo or said.turbo)


def known_of(model: Model, run: Mapping[str, Any], guessed: bool) -> Known:
    """What the header of a LoRA's file says of its model.

    run: what its run says of the scheduler, which comes first; guessed: whether the model is known `by_size`: the configs
    of SD 2 are then those of its model for v, and those of SDXL not Turbo's, and images of these are larger than the others'.
    """
    known = Known(model.denoiser.config, {**model.scheduler_config, **run}, model.turbo, model.geometry.native)
    return known._replace(side=0) if guessed and (known.turbo or architecture(known) == V2) else known


def named(
    adapter: Adapter, denoiser: str, kohya_name: Callable[[str], str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a LoRA by name, and what its header must say of them.

    denoiser: its name in the pipeline; kohya_name: a layer's name in sd-scripts, whose names ComfyUI and A1111 read;
    None: the names of diffusers.
    """
    if kohya_name is not None:
        return lora.kohya(_of_one_alpha(adapter), kohya_name), {}
    tensors = {f"{denoiser}.{name}": value for name, value in lora.peft(adapter).items()}
    told = {f"{denoiser}.{name}": value for name, value in _peft_config(adapter).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(told, sort_keys=True)}


def _of_one_alpha(adapter: Adapter) -> Adapter:
    """The same additions with one alpha for all layers, whatever their ranks: the rest of the scale is in the factors.

    diffusers (to 0.42) drops alphas that differ from the usual one where it reads these names in a model of SD.
    """
    if len({factors.alpha for factors in adapter.values()}) == 1:
        return adapter
    alpha = float(max(factors.rank for factors in adapter.values()))
    return {name: Factors(down, up * (own / alpha), alpha) for name, (down, up, own) in adapter.items()}


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """peft's settings of an adapter whose scale is in its factors: alpha is the rank, layer by layer."""
    ranks = {name: factors.rank for name, factors in adapter.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(adapter),
        "peft_type": "LORA",
        "lora_dropout": 0.0,
        "bias": "none",
    }

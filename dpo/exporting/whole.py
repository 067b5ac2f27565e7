"""A whole model handed on: as one file in the original layout, tensor by tensor, or as a diffusers folder in fp16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.exporting.pieces import Piece, Pieces, converted, of_files, of_tensors
from dpo.exporting.spec import Known, velocity
from dpo.models import original
from dpo.models.family import Family, Model
from dpo.models.load import family_of, read_index, read_scheduler
from dpo.models.parts import absent_parts, check_files, configs_of, is_few_steps, weight_files
from dpo.models.save import save_pipeline
from dpo.models.weights import UNET, VAE, renamed

POSITIONS = (
    "text_model.embeddings.position_ids"  # a counter, in old files; OpenAI's encoder has it in the original layout
)


class Whole(NamedTuple):
    """A model as tensors to come: shapes and content by part of the pipeline and diffusers' name."""

    family: Family
    configs: Mapping[str, Mapping[str, Any]]  # by part
    parts: dict[str, Pieces]
    known: Known


def of_folder(folder: Path, name: str) -> Whole:
    """The model in a diffusers folder, which is only read when it is written. name: as the user said it. UserError."""
    index = read_index(folder)
    family = family_of(index)
    configs = configs_of(family, folder, None, None, absent_parts(family, index))
    scheduler, _ = read_scheduler(folder, name, family)
    parts: dict[str, Pieces] = {}
    for part in configs:
        check_files(folder / part, None)
        files = weight_files(folder / part, None)
        if not files:
            raise UserError(f"{folder / part} has no weights in .safetensors files: fetch the model again")
        parts[part] = {_plain(part, key): piece for key, piece in of_files(files).items()}
    denoiser = configs[family.denoiser]
    side = family.geometry(denoiser, configs["vae"]).native
    turbo = is_few_steps(family, name, index, denoiser, scheduler, "all")
    return Whole(family, configs, parts, Known(denoiser, scheduler, turbo, side))


def _has_layout(family: Family, said: str) -> None:
    """Raises UserError, which begins with `said`, for a family that is never written as one file."""
    if family.single_file_key is None:
        raise UserError(
            f"{said} is of family {family.name}, which is written in diffusers' layout alone: the folder of the run is that, and "
            "--merge --to diffusers makes one of a LoRA"
        )


def _plain(part: str, name: str) -> str:
    return renamed(name) if part == "vae" else name


def of_model(model: Model) -> Whole:
    """A model that is in memory."""
    modules: dict[str, Any] = {model.family.denoiser: model.denoiser, "vae": model.vae}
    modules |= {name: one for name, one in model.named_encoders().items() if one is not None}
    configs = {
        name: one.config.to_dict() if hasattr(one.config, "to_dict") else one.config for name, one in modules.items()
    }
    known = Known(model.denoiser.config, model.scheduler_config, model.turbo, model.geometry.native)
    return Whole(model.family, configs, {name: of_tensors(one.state_dict()) for name, one in modules.items()}, known)


def in_one(whole: Whole, said: str) -> Pieces:
    """Every tensor of the model under the names of the original layout.

    Raises UserError, which begins with `said`, for an architecture that has no place there.
    """
    _has_layout(whole.family, said)
    unet, vae = whole.parts["unet"], whole.parts["vae"]
    original.check_networks(_shapes(unet), _shapes(vae), whole.configs, said)
    found = _made(UNET.prefixes[0], original.unet(_shapes(unet)), unet)
    return found | around(whole) | of_tensors(_marks(whole.known))


def around(whole: Whole) -> Pieces:
    """The VAE and the text encoders under the names of the original layout."""
    vae = whole.parts["vae"]
    found = _made(VAE.prefixes[0], original.vae(_shapes(vae)), vae)
    encoders = [name for name, _ in whole.family.text_encoders]
    acts = [str(whole.configs[name].get("hidden_act", "quick_gelu")) for name in encoders]
    for name, (prefix, layout) in zip(encoders, original.text_places(whole.family.name, acts), strict=True):
        pieces = {key: one for key, one in whole.parts[name].items() if not key.endswith("position_ids")}
        found |= _made(prefix, layout(_shapes(pieces)), pieces)
        if layout is original.clip:
            length = int(whole.configs[name]["max_position_embeddings"])
            found |= of_tensors({prefix + POSITIONS: torch.arange(length).expand(1, -1)})
    return found


def _shapes(pieces: Pieces) -> dict[str, tuple[int, ...]]:
    return {name: piece.shape for name, piece in pieces.items()}


def _made(prefix: str, layout: original.Layout, pieces: Pieces) -> Pieces:
    def make(made: original.Made) -> Tensor:
        return original.HOW[made.how]([pieces[name].make() for name in made.of])

    shapes = _shapes(pieces)
    return {
        prefix + name: Piece(
            original.shape_of(made, shapes),
            pieces[made.of[0]].dtype,
            lambda made=made: make(made),  # type: ignore[misc]
        )
        for name, made in layout.items()
    }


def _marks(known: Known) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and others know v-prediction and zero terminal SNR."""
    zero = bool(known.scheduler.get("rescale_betas_zero_snr"))
    return {name: torch.zeros(0) for name, on in (("v_pred", velocity(known)), ("ztsnr", zero)) if on}


def save_half(model: Model, folder: Path) -> list[str]:
    """Writes the pipeline in fp16 as a diffusers folder; the names of its files. Raises UserError for an overflow."""
    for module in (model.denoiser, model.vae, *model.text_encoders):
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                converted(name, value, torch.float16)
        module.to(torch.float16)
    return save_pipeline(model, model.denoiser, folder)

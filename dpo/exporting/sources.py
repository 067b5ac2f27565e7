"""The two models of an extraction: run folders, diffusers folders or single files, read one layer at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo.common.errors import UserError
from dpo.exporting import whole
from dpo.exporting.pieces import Piece, Pieces, of_file
from dpo.exporting.spec import Known
from dpo.models import original
from dpo.models.family import Family
from dpo.models.fingerprint import checksum_of
from dpo.models.hub import LORA_FILES, locate
from dpo.models.single_file import Said, family_by_keys, said_by
from dpo.models.weights import UNET, VAE
from dpo.pages.began import start_of
from dpo.sampling.model import check_result, settings_of

log = logging.getLogger("dpo")

TEXT = ("cond_stage_model.", "conditioner.")
DOWN = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight")
UNUSED = re.compile(
    rf"position_ids$|logit_scale$|^cond_stage_model\.model\.transformer\.resblocks\.{original.SD2_LAYERS}\."
)
BESIDE = (
    "unet_init",
    "lora_init",
    "variant",
)  # settings of a run by which it began with other weights than its model's
NO_LORA = "holds a LoRA, no whole model: its file is what an extraction would give"


class Side(NamedTuple):
    """One of the two models."""

    said: str  # as the user named it
    denoiser: Pieces  # by diffusers' names
    others: Pieces  # VAE and text encoders, by the original names; of a flow by those of the part and of diffusers
    scheduler: Mapping[str, Any]  # {} where a single file does not say
    side: int  # pixels that it was trained at; 0 where it is not known
    flow: Family | None = None  # its family, where that is one of flow matching
    turbo: bool = False  # distilled to a few steps, by what the model says of itself

    @property
    def family(self) -> str:
        """The name of its family; SDXL has sizes beside the text."""
        if self.flow is not None:
            return self.flow.name
        return "sdxl" if "add_embedding.linear_1.weight" in self.denoiser else "sd"

    def known(self) -> Known:
        """What a file's header says of it."""
        if self.flow is not None:
            return Known({}, self.scheduler, self.turbo, self.side)
        levels = range(
            sum(name.endswith("resnets.0.conv2.weight") and name.startswith("down") for name in self.denoiser)
        )
        widths = [self.denoiser[f"down_blocks.{level}.resnets.0.conv2.weight"].shape[0] for level in levels]
        text = next((one.shape[1] for name, one in self.denoiser.items() if name.endswith("attn2.to_k.weight")), 0)
        unet = {"block_out_channels": widths, "cross_attention_dim": text}
        return Known(unet, self.scheduler, self.turbo, self.side)


def opened(name: str, cache_dir: str | None) -> Side:
    """The model that `name` stands for. Raises UserError for what is none."""
    folder = Path(name).expanduser()
    check_result(name)
    if not (folder / "model_index.json").is_file() and any((folder / one).is_file() for one in LORA_FILES):
        raise UserError(f"{name} {NO_LORA}")
    wanted = settings_of(name)
    if beside := next((one for one in BESIDE if wanted.get(one)), None):
        raise UserError(
            f"{name}: that run began with --{beside.replace('_', '-')} {wanted[beside]}, which is not in the files of its "
            "model: name one whole model (python -m dpo.export writes it)"
        )
    place = locate(wanted["model"], revision=wanted.get("revision"), cache_dir=cache_dir)
    if place.is_file():
        return _of_file(place, name)
    model = whole.of_folder(place, name)
    family, known = model.family, model.known
    if family.flow is None:
        others = whole.around(model)
        return Side(name, model.parts["unet"], others, known.scheduler, known.side, turbo=known.turbo)
    parts = [part for part in model.parts if part != family.denoiser]
    others = {f"{part}.{key}": piece for part in parts for key, piece in model.parts[part].items()}
    return Side(name, model.parts[family.denoiser], others, known.scheduler, known.side, family, known.turbo)


def _of_file(path: Path, name: str) -> Side:
    pieces = of_file(path)
    prefix = UNET.prefixes[0]
    unet = {key.removeprefix(prefix): piece for key, piece in pieces.items() if key.startswith(prefix)}
    if not unet:
        kind = NO_LORA if any("lora" in key for key in pieces) else "is no whole model in the original layout"
        raise UserError(f"{name} {kind}")
    others = {key: piece for key, piece in pieces.items() if key.startswith((VAE.prefixes[0], *TEXT))}
    said = Said({}, [])
    with suppress(UserError):  # what is not trained here can be extracted from all the same
        said = said_by(path, family_by_keys(set(pieces)))
    return Side(name, _in_diffusers(unet, name), others, said.scheduler, 0, turbo=said.turbo)


def _in_diffusers(unet: Pieces, said: str) -> Pieces:
    """The tensors of a UNet in the original layout under diffusers' names. Raises UserError for another network."""
    from diffusers.loaders import single_file_utils

    given = {name: torch.empty(piece.shape, device="meta") for name, piece in unet.items()}
    first = min((int(match[1]) for name in given if (match := DOWN.fullmatch(name))), default=2)
    config: dict[str, Any] = {"layers_per_block": first - 1}
    config |= {"addition_embed_type": "text_time"} if "label_emb.0.0.weight" in given else {}
    try:
        found = single_file_utils.convert_ldm_unet_checkpoint(
            {UNET.prefixes[0] + name: value for name, value in given.items()}, config
        )
    except Exception:  # it looks names up without asking
        found = {}
    named = {id(value): name for name, value in given.items()}
    shapes = {name: tuple(value.shape) for name, value in found.items() if value is not None}
    back = {name: made.of[0] for name, made in original.unet(shapes).items()}
    if back.keys() != given.keys() or any(named[id(found[back[name]])] != name for name in given):
        raise UserError(f"{said}: its UNet is of an architecture that this trainer does not know")
    return {name: unet[named[id(found[name])]] for name in shapes}


def check_start(aligned: Side, base: Side) -> None:
    """Warns where the aligned model is a run's that began with other weights than the base's. Raises UserError where the two are swapped.

    By what the folders of runs say of it; of other models it is not known.
    """
    other = start_of(Path(base.said).expanduser())
    if other is not None and other.is_model(aligned.said, _checksum(aligned)):
        raise UserError(
            f"{aligned.said} is what --base {base.said} began with: the two are swapped, so name the aligned model first, and "
            f"--base {aligned.said}"
        )
    start = start_of(Path(aligned.said).expanduser())
    if start is not None and start.is_model(base.said, _checksum(base)) is False:
        began = start.said if start.said != base.said else f"what {base.said} was then"
        log.warning(
            "%s began with %s, not with --base %s: the LoRA also holds what these two differ in",
            aligned.said, began, base.said,
        )  # fmt: skip


def _checksum(side: Side) -> str:
    """That of its denoiser as the trainer loads it, tensor by tensor."""
    return checksum_of({name: piece.make for name, piece in side.denoiser.items()}, dtype=torch.float32)


def check_alike(aligned: Side, base: Side) -> bool:
    """Whether the VAEs and text encoders are equal bit for bit, and not only to the rounding of one of the files.

    Where none is in both files, nothing says so. Raises UserError where they differ by more, or the denoisers are of two architectures.
    """
    wrong = [
        name
        for name, piece in base.denoiser.items()
        if name not in aligned.denoiser or aligned.denoiser[name].shape != piece.shape
    ]
    wrong += [name for name in aligned.denoiser if name not in base.denoiser]
    if wrong:
        raise UserError(
            f"{aligned.said} is of another architecture than --base {base.said} (first mismatch: {wrong[0]}): name the "
            "model that it was trained from"
        )
    both = [name for name in sorted(aligned.others.keys() & base.others.keys()) if not UNUSED.search(name)]
    exact = bool(both)
    for name in both:
        one, other = aligned.others[name], base.others[name]
        equal = one.shape == other.shape and torch.equal(one.make().double(), other.make().double())
        if not (equal or (one.shape == other.shape and _rounded(one, other))):
            part = "VAE" if name.startswith((VAE.prefixes[0], "vae.")) else "text encoder"
            raise UserError(
                f"{aligned.said} has another {part} than --base {base.said} ({name}): a LoRA of the denoiser cannot hold that; "
                "name the model that it was trained from, or hand on the whole model"
            )
        exact = exact and equal
    return exact


def _rounded(one: Piece, other: Piece) -> bool:
    """Whether two tensors of two dtypes differ by no more than the rounding to the coarser of these."""
    if one.dtype == other.dtype:
        return False
    step = torch.finfo(coarser(one.dtype, other.dtype)).eps
    left, right = one.make().double(), other.make().double()
    return bool(((left - right).abs() <= step * left.abs() + 2.0**-24).all())


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The one with the largest steps."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

"""Weights that a user converted from a published pickle, found and read: safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import first_line


def converted(name: str, source: str, place: str | None) -> Path:
    """The safetensors file of scorer `name` at `place`, a file or a folder with one. Raises UserError where there is none."""
    remedy = f"convert {source} once (python -m dpo.evaluate --convert FILE) and name what that writes, {name}:FILE"
    if place is None:
        raise UserError(f"{name}: its weights are published as a pickle, which is not read here; {remedy}")
    path = Path(place).expanduser()
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(found) != 1:
        raise UserError(f"{name}: {path} holds {len(found)} .safetensors files, not one; name the file, {name}:FILE")
    if found[0].suffix != ".safetensors" or not found[0].is_file():
        raise UserError(f"{name}: {found[0]} is no .safetensors file; {remedy}")
    return found[0]


class Header(NamedTuple):
    """What a safetensors file says of itself: no tensor is read for it."""

    about: dict[str, str]  # its metadata
    shapes: dict[str, list[int]]  # of its tensors


def header(path: Path) -> Header:
    """The header of a safetensors file. Raises UserError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return Header(file.metadata() or {}, {name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); convert the published file again") from error


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises UserError for a damaged one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); convert the published file again") from error


def fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put `state`, read from `path`, into a module of the meta device. Raises UserError where they are not of one shape."""
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} holds other weights than this scorer's ({reason}); convert the published file"
        ) from error

"""Tensors that are read or made only when they are asked for, and .safetensors files written from them one by one.

A model is then never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import write_whole, writing
from dpo.common.words import first_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HASH = "modelspec.hash_sha256"
NO_HASH = "0x" + "0" * 64  # stands for it until all content is written
LARGEST = torch.finfo(torch.float16).max


class Piece(NamedTuple):
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


Pieces: TypeAlias = dict[str, Piece]


def of_tensors(tensors: Mapping[str, Tensor]) -> Pieces:
    """Tensors that are in memory."""
    return {name: Piece(tuple(value.shape), value.dtype, partial(_same, value)) for name, value in tensors.items()}


def _same(value: Tensor) -> Tensor:
    return value


def of_file(path: Path) -> Pieces:
    """The tensors of a .safetensors file. Raises UserError for one that cannot be read, or holds other numbers."""
    found: Pieces = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                held = file.get_slice(name)
                if (dtype := DTYPES.get(held.get_dtype())) is None:
                    raise UserError(f"{path} holds {name} as {held.get_dtype()}: use a file in fp32, bf16 or fp16")
                found[name] = Piece(tuple(held.get_shape()), dtype, partial(_read, path, name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
    return found


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def of_files(paths: list[Path]) -> Pieces:
    """The tensors of some files. Raises UserError, also where two of them have a tensor of one name: these are two models."""
    found: Pieces = {}
    holders: dict[str, Path] = {}
    for path in paths:
        pieces = of_file(path)
        if twice := next((name for name in pieces if name in holders), None):
            raise UserError(
                f"{path} and {holders[twice].name} both hold {twice}: keep one whole file, or the parts of one, and move the other away"
            )
        found |= pieces
        holders |= dict.fromkeys(pieces, path)
    return found


def write(path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str], *, fp16: bool) -> None:
    """Writes `pieces` as a .safetensors file, one after the other and in one step, with the hash of all content.

    fp16: floating-point numbers in half precision. Raises UserError for a value that is not finite, or not in fp16, and
    for what `disk_error` knows.
    """
    kept = {name: torch.float16 if fp16 and one.dtype.is_floating_point else one.dtype for name, one in pieces.items()}
    order = sorted(pieces, key=lambda name: (-kept[name].itemsize, name))  # as the format's own writer: aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata, HASH: NO_HASH}}
    at = 0
    for name in order:
        size = prod(pieces[name].shape) * kept[name].itemsize
        header[name] = {"dtype": CODES[kept[name]], "shape": list(pieces[name].shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def fill(part: Path) -> None:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            total = hashlib.sha256()
            for name in order:
                _put(file, total, converted(name, pieces[name].make(), kept[name]))
            file.seek(8)
            file.write(text.replace(NO_HASH.encode(), b"0x" + total.hexdigest().encode()))

    with writing(path, "start the same command again"):
        write_whole(path, fill)


def _put(file: BinaryIO, total: hashlib._Hash, value: Tensor) -> None:
    content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
    file.write(content)
    total.update(content)


def converted(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as `dtype`. Raises UserError where a number is not finite, or is not in that dtype."""
    changed = value.to(dtype)
    if changed.is_floating_point() and not torch.isfinite(changed).all():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} has NaN or infinity: the model is damaged")
        largest = value.abs().max()
        raise UserError(
            f"{name} does not fit into fp16: it has {largest:.4g}, and fp16 ends at {LARGEST:.0f}; leave --fp16 out"
        )
    return changed

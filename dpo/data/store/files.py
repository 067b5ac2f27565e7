"""Files of a prepared store: safetensors shards that are memory-mapped, and a JSON index with a checksum of its own.

Every file is written beside its place, flushed to disk and renamed, so that it is there whole or not at all. A shard
belongs to the store only once the index names it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum, disk_full, sealed, unseal, write_whole
from dpo.common.words import excerpt, first_line

FORMAT = 1
INDEX = "store.json"
NOT_ALWAYS = ("encoders",)  # settings that stores of earlier versions lack: not compared then
UNNAMED = {"buckets": 0, "sides": 2}  # what an index without this name means
PREPARE_AGAIN = "delete its store.json and shards, and prepare it again"
SEAL = "checksum"  # the key under which a JSON file of a store carries the digest of its rest
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip


CHUNK = 1 << 24


class DamagedStore(UserError):
    """A file of a store that is missing, truncated or altered; the message names it."""


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole`, which makes the folder first. Raises UserError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except (OSError, SafetensorError) as error:
        full = disk_full(error, path, "run it again")
        raise full or UserError(f"cannot write {path} ({first_line(error)})") from error


def sweep_away(folder: Path) -> None:
    """Removes the unfinished files that killed writers left in `folder`: those of `write_whole` and of safetensors."""
    for pattern in (".*.part-*", ".tmp??????"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes one safetensors file; returns its entry for an index: {"file", "bytes", "header", "sha256"}."""
    _write(path, lambda part: save_file({name: value.contiguous() for name, value in tensors.items()}, part))
    return {"file": path.name, "bytes": path.stat().st_size, "header": header_digest(path), "sha256": checksum(path)}


def header_digest(path: Path) -> str:
    """SHA-256, hexadecimal, of the header of a safetensors file: names, dtypes, shapes and offsets."""
    with open(path, "rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), CHUNK))).hexdigest()


def check_shard(path: Path, entry: Mapping[str, Any], whole: bool = False, remedy: str = PREPARE_AGAIN) -> None:
    """Raises DamagedStore for a missing file, or when its size, header or (`whole`) checksum differs from its entry.

    remedy: what the message tells the user to do.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedStore(f"{path} is missing: {remedy}, or copy that file from where it came from") from error
    if size != entry["bytes"]:
        raise DamagedStore(
            f"{path} has {size} bytes instead of {entry['bytes']}: it was truncated or replaced; {remedy}"
        )
    if header_digest(path) != entry["header"] or (whole and checksum(path) != entry["sha256"]):
        raise DamagedStore(f"{path} was altered: its checksum is not the one in {INDEX}; {remedy}")


def open_shard(path: Path, remedy: str = PREPARE_AGAIN) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views on a private memory map: nothing is read before it is used.

    safetensors' own reader copies whole tensors, and Python's mmap keeps a file descriptor per file. Raises
    DamagedStore.
    """
    try:
        raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        length = int.from_bytes(bytes(raw[:8].tolist()), "little")
        header = json.loads(bytes(raw[8 : 8 + length].numpy()))
        header.pop("__metadata__", None)
        data = raw[8 + length :]
        return {name: _view(data, entry) for name, entry in header.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DamagedStore(f"{path} is not safetensors ({first_line(error)}); {remedy}") from error


def _view(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    return data[begin:end].view(dtype).view(entry["shape"])


def crc(*tensors: Tensor) -> int:
    """CRC-32 over the bytes of some CPU tensors, one after another."""
    total = 0
    for value in tensors:
        if value.numel():
            total = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Replaces the index of a store. Raises UserError when it cannot be written."""
    write_sealed(folder / INDEX, index)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a store, None where there is none. Raises as `read_sealed` does."""
    return read_sealed(folder / INDEX, PREPARE_AGAIN)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file by `content`, with its format and a checksum of itself. Raises UserError when it cannot."""
    rest = {name: value for name, value in content.items() if name != "format"}
    text = sealed({"format": FORMAT, **rest}, SEAL)
    _write(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def read_sealed(path: Path, remedy: str) -> dict[str, Any] | None:
    """The content that `write_sealed` wrote, None where there is no such file.

    Raises DamagedStore for a truncated or altered file, UserError for another format; the message ends in `remedy`.
    """
    try:
        content, unaltered = unseal(path.read_text(encoding="utf-8"), SEAL)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedStore(f"{path} was truncated or altered; {remedy}") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {excerpt(content.get('format'))}, this version reads {FORMAT}: {remedy}")
    if not unaltered:
        raise DamagedStore(f"{path} was altered: its checksum is wrong; {remedy}")
    return content


TABLE_PREFIXES = (
    "pair_", "bad_", "image_key", "image_crc", "image_micro", "image_end",
    "caption_key", "caption_crc", "caption_end", "caption_text", "caption_span",
)  # fmt: skip


LATENTS = ("image_mean", "image_std", "image_mean_flip", "image_std_flip")
# Encoded captions by place, as models.family.TextEncoding has them: hidden states, pooled vectors, mask; None where a family
# has none.
Parts: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None]"

HIDDEN, POOLED = TEXT = ("caption_hidden", "caption_pooled")
SPAN = "caption_span"  # [N] int64: where the hidden states of each caption end, which lie one after another without padding
NOWHERE = -1  # the row of an image that cannot be used
TWICE = -2  # the row of both images of a pair that are one
ROUNDING = 1e-6  # of a label


def each(parts: Parts, function: Callable[[Tensor], Tensor]) -> Parts:
    """`function` of each part that there is."""
    hidden, pooled, mask = parts
    return function(hidden), None if pooled is None else function(pooled), None if mask is None else function(mask)


def tables_crc(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over the tables of a shard: all but latents and encoded text, which have a checksum for each row."""
    return crc(*(tensors[name] for name in sorted(tensors) if name.startswith(TABLE_PREFIXES)))

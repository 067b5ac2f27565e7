"""From a published pickle to safetensors, once: the only place where anything is unpickled, and then tensors alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum, write_whole
from dpo.common.words import first_line
from dpo.scorers import hpsv2
from dpo.scorers.published import header

NESTED = ("state_dict", "model")  # keys under which published checkpoints hold their weights


def convert(source: Path, target: Path | None = None) -> Path:
    """Writes the tensors of a pickle as safetensors; the path, by default that of `source` with another ending.

    Reads with weights_only: what is no tensor or plain value in the pickle is refused, and no code of it runs. The
    file's metadata holds the name of the pickle, which says HPSv2's version, and its SHA-256. A CLIP in open_clip's names
    gets transformers'. What was made of the same pickle before is left as it is. Raises UserError, also where another file is there.
    """
    target = source.with_suffix(".safetensors") if target is None else target
    if target.is_file() and source.is_file():
        if _source_of(target) == checksum(source):
            return target
        raise UserError(
            f"{target} is there already, and not converted from this {source.name}: move one of them to another folder"
        )
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that meets bytes of any kind raises any kind
        raise UserError(
            f"{source} cannot be read as a file of weights ({first_line(error)}); fetch it again"
        ) from error
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = (
        {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )
    if not tensors:
        raise UserError(f"{source} holds no weights by name; name the published checkpoint")
    if hpsv2.is_published(tensors):
        try:
            tensors = hpsv2.from_published(tensors)
        except (RuntimeError, ValueError) as error:  # tensors of no CLIP's shapes
            raise UserError(
                f"{source} holds other weights than open_clip's ({first_line(error)}); fetch it again"
            ) from error
    own = {name: value.detach().contiguous().clone() for name, value in tensors.items()}  # no two share memory
    about = {"source": source.name, "source_sha256": checksum(source)}
    try:
        write_whole(target, lambda part: save_file(own, part, metadata=about))
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror}); move {source.name} to a folder with room that can be written"
        ) from error
    return target


def _source_of(target: Path) -> str | None:
    """The checksum of the pickle that a file was converted from; None for one that does not say."""
    try:
        return header(target).about.get("source_sha256")
    except UserError:
        return None

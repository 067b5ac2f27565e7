"""From a published pickle to safetensors, once: the only place where anything is unpickled, and then tensors alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum, write_whole
from dpo.common.words import first_line

NESTED = ("state_dict", "model")  # keys under which published checkpoints hold their weights


def convert(source: Path, target: Path | None = None) -> Path:
    """Writes the tensors of a pickle as safetensors; the path, by default that of `source` with another ending.

    Reads with weights_only: what is no tensor or plain value in the pickle is refused, and no code of it runs. The
    file's metadata holds the SHA-256 of the pickle. Raises UserError.
    """
    target = source.with_suffix(".safetensors") if target is None else target
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
    own = {name: value.detach().contiguous().clone() for name, value in tensors.items()}  # no two share memory
    about = {"source": source.name, "source_sha256": checksum(source)}
    try:
        write_whole(target, lambda part: save_file(own, part, metadata=about))
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror}); name another folder with --output") from error
    return target

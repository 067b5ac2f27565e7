"""Files written whole, checked and sealed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dpo.common.errors import UserError

CHUNK = 1 << 24


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old file or the new one, never half of it."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def disk_error(error: OSError | SafetensorError, path: Path) -> Exception:
    """What to raise when `path` cannot be written: a UserError where a person can mend it, else the error itself."""
    if isinstance(error, SafetensorError):  # it wraps the system's error as text
        error = OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free / 2**30
        return UserError(
            f"the disk is full ({free:.1f} GiB left at {path.parent}): free some space, then go on with --resume latest"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"cannot write {path}: {error.strerror}; choose another --output")
    return error


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of what state.json says, so that an altered number is noticed like an altered tensor."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

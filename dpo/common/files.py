"""Files written whole, checked and sealed."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.common.errors import UserError

if TYPE_CHECKING:  # commands import this file before anybody knows that the package is installed
    from safetensors import SafetensorError

CHUNK = 1 << 24
LOOK = 1.0  # seconds between two looks at files that are mapped: a set may have hundreds
RESUME = "go on with --resume latest"
AGAIN = "start the same command again"
NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EISDIR)

log = logging.getLogger("dpo")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` in one step by what `write` writes to the path it is given, with the permissions of a new file.

    A reader sees the old file or the new one, each whole. The new file lies hidden beside `path` until it is on disk,
    and is removed when anything fails. A link at `path` is replaced itself, and what it points to stays as it is.
    Errors are raised unchanged; `disk_error` turns them into words.
    """
    part = beside(path)
    mode = _create(part)
    try:
        write(part)
        _permit(part, mode)
        sync_file(part)
        replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def is_there(text: str) -> bool:
    """Whether a word of a command line is the path of something; one that can be no path is none."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, ~ of nobody
        return False


def make_folder(folder: Path, flag: str) -> None:
    """Makes a folder, and those above it. Raises UserError, naming the `flag` that named it, when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{flag} {folder}: a file is there; name a folder") from error
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be made ({error.strerror}); name another folder") from error


@contextmanager
def made(folder: Path, flag: str) -> Iterator[list[Path]]:
    """Inside the block `folder` is there, made as `make_folder` does it; the folders that this made, the deepest first.

    Those that are empty at the end are taken away again: a command that is refused leaves none, and nothing that was there
    before is removed. Raises UserError.
    """
    new = [path for path in (folder, *folder.absolute().parents) if not os.path.lexists(path)]
    make_folder(folder, flag)
    try:
        yield new
    finally:
        for one in new:
            with suppress(OSError):  # something was put there
                one.rmdir()


def write_text(path: Path, text: str, remedy: str = RESUME) -> None:
    """Replace `path` by `text` (UTF-8) in one step. Raises the error that `disk_error` makes of an OSError."""
    with writing(path, remedy):
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


@contextmanager
def writing(path: Path, remedy: str = RESUME) -> Iterator[None]:
    """Around the writing of `path`: raises what `disk_error` makes of an OSError."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, remedy) from error


def beside(path: Path) -> Path:
    """A hidden name beside `path` that nobody can guess, for what becomes `path`, or was; `sweep` knows it."""
    return path.with_name(f".{path.name}.part-{uuid.uuid4().hex}")


def sweep(folder: Path, name: str = "*") -> None:
    """Deletes what killed processes left in `folder` under names of `beside` for a path of this name (or pattern)."""
    for path in folder.glob(f".{name}.part-*"):
        remove(path)


def remove(path: Path) -> None:
    """Deletes a file, a folder or a link (not what it points to) as far as the system lets it; raises nothing."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _create(path: Path) -> int:
    """Makes an empty file and returns its mode. Raises FileExistsError where anything, a link too, has that name."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


def _permit(path: Path, mode: int) -> None:
    with suppress(OSError):  # a file system without permissions
        path.chmod(stat.S_IMODE(mode))


def follow_umask(folder: Path) -> None:
    """Gives every file below `folder` the permissions of a new file: safetensors writes for the owner's eyes alone.

    The umask itself is not asked for: it can only be read by changing it, under all threads.
    """
    probe = beside(folder / "permissions")
    mode = _create(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            _permit(path, mode)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, tried for a second on Windows, where another program that has the file open stands in the way."""
    for wait in (0.1, 0.2, 0.3, 0.4, 0.0):
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if not wait or getattr(error, "winerror", None) is None:
                raise
            time.sleep(wait)


def discard(folder: Path) -> None:
    """Deletes a folder that nobody needs: where the system keeps a part of it, a warning, and no error.

    NFS keeps files that are open somewhere. The folder is renamed first, so that what is left of it is not taken for a
    whole one.
    """
    hidden = beside(folder)
    try:
        os.replace(folder, hidden)
        if hidden.is_symlink():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)
    except OSError as error:
        log.warning("%s is not needed any more and cannot be deleted (%s)", folder, error.strerror or error)


def disk_full(error: Exception, path: Path, remedy: str) -> UserError | None:
    """The UserError for a full disk under `path`, which ends in `remedy`; None when `error` is about something else."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
        return None
    free = shutil.disk_usage(path.parent).free / 2**30
    return UserError(f"the disk is full ({free:.1f} GiB left at {path.parent}): free some space, then {remedy}")


def disk_error(error: OSError | SafetensorError, path: Path, remedy: str = RESUME) -> Exception:
    """What to raise when `path` cannot be written: a UserError where a person can mend it, else the system's error.

    remedy: how the command goes on once a full disk has some space.
    """
    if full := disk_full(error, path, remedy):
        return full
    if getattr(error, "errno", None) == errno.EFBIG or "File too large" in str(error):
        return UserError(f"{path} may not grow so large here: raise the limit (ulimit -f), or choose another --output")
    if not isinstance(error, OSError):  # safetensors gives the system's error as text only
        return OSError(errno.EIO, str(error))
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        named = error.filename2 or error.filename
        where = named if isinstance(named, str) and ".part-" not in named else path
        return UserError(f"cannot write {where}: {error.strerror}; choose another --output")
    return error


class Mapped:
    """Files that are mapped into memory: a read beyond the end of one that was cut short would kill the process.

    A file that was deleted or replaced stays for who has mapped it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._before = {path: _stamp(path) for path in paths}
        self._next = 0.0

    def check(self) -> None:
        """Raises UserError when a file was cut short or overwritten in place. Looks once in LOOK seconds at most."""
        if time.monotonic() < self._next:
            return
        for path, before in self._before.items():
            try:
                now = _stamp(path)
            except OSError:
                continue
            if now[0] == before[0] and now != before:
                raise UserError(
                    f"{path} was changed while it was in use: put it back as it was, then go on with --resume latest"
                )
        self._next = time.monotonic() + LOOK


def _stamp(path: Path) -> tuple[int, int, int]:
    """What tells the content of a file from a later one without reading it: inode, bytes, time of the last change [ns]."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk: a rename inside it then outlives a power cut.

    Does nothing where that is not offered: CIFS and WSL refuse it, Windows does not open folders.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "rb+") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def sealed(content: Mapping[str, Any], key: str) -> str:
    """`content` as JSON, with the SHA-256 of all of it added under `key`, so that an altered number is noticed."""
    plain = json.loads(json.dumps(content))  # the form that `unseal` reads: tuples are lists, keys are text
    return json.dumps({**plain, key: _content_digest(plain)}, indent=1)


def unseal(text: str, key: str) -> tuple[dict[str, Any], bool]:
    """The content that `sealed` was given, and whether it is unaltered.

    Raises ValueError for text not made by `sealed`.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"not a JSON object with {key!r}")
    found = content.pop(key)
    return content, found == _content_digest(content)


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

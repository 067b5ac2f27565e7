"""One process at a time in a folder that is written."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.common.errors import UserError
from dpo.common.files import made, sweep, write_whole

if TYPE_CHECKING:  # commands import this file before anybody knows that the package is installed
    from filelock import FileLock

WAIT = 8.0  # seconds: the workers of a process that was killed hold its lock until they notice
NAME = ".lock"  # stays, empty: deleting it alone, without its folder, would let two processes hold two of that name

log = logging.getLogger("dpo")


@contextmanager
def held(folder: Path, flag: str, part: str = "", wait: float | None = None) -> Iterator[None]:
    """Inside the block this process alone holds `folder`; the system lets go of it when a process dies.

    A folder that is not there is made, and taken away again where the block has put nothing into it: a command that is
    refused leaves none. flag: that names the folder. part: what of the folder, where several processes share it.
    wait: seconds, WAIT unless said. Who holds it, on which
    machine and since when stands beside the lock, as a locked file cannot be read everywhere. Raises UserError when
    another process holds it. On a file system without locks, as some network ones are, a warning is all.
    """
    with made(folder, flag) as new, _locked(folder, flag, part, WAIT if wait is None else wait, alone=folder in new):
        yield


@contextmanager
def _locked(folder: Path, flag: str, part: str, wait: float, *, alone: bool) -> Iterator[None]:
    """`held` of a folder that is there; alone: at the end the lock's file goes where nothing else is in the folder."""
    from filelock import FileLock, Timeout

    place = folder / f"{NAME}{part}"
    holder = place.with_name(f"{place.name}.json")
    lock = FileLock(place)
    try:
        _acquire(lock, folder, wait)
    except Timeout:
        raise UserError(
            f"{flag} {folder} is in use by {_read(holder)}: wait until that ends, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): start no second process in it", folder, error)
        yield
        return
    try:
        sweep(folder, holder.name)
        with suppress(OSError):
            write_whole(holder, lambda part: part.write_text(json.dumps(_about()), encoding="utf-8"))
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        with suppress(OSError):  # before others can have the lock; on Windows the release does it
            if alone and list(folder.iterdir()) == [place]:
                place.unlink()
        lock.release()


def _acquire(lock: FileLock, folder: Path, wait: float) -> None:
    """Acquires the lock; where another process took away the folder, which it had found empty, that is made again."""
    for _ in range(3):
        try:
            lock.acquire(timeout=wait)
            return
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
    lock.acquire(timeout=wait)


def _about() -> dict[str, str | int]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since}


def _read(holder: Path) -> str:
    """Who holds a lock, in words."""
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

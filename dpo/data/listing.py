"""The files of a folder: which may be data, and how those that are not read are counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dpo.common import locks
from dpo.common.errors import UserError

NOT_READ = "files not read: "  # begins the name of a count of files; the other counts of a summary are of rows
CAPTION_FILES = "caption files"  # a count of files too
HIDDEN = "hidden"
BAD_NAME = "with a name that is not UTF-8"
KINDS = 8  # kinds of files counted one by one
LONGEST_KIND = 12  # characters; what is longer after a dot is no extension

# Files and folders that systems put beside a user's own: thumbnails, indexes, bins. Others begin with a dot: ._ twins
# of macOS, .ipynb_checkpoints, .cache of the hub, .git.
JUNK = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "#recycle", "$recycle.bin",
    "system volume information", "lost+found", "icon\r",
}  # fmt: skip


class NoSplit(UserError):
    """The wanted split is not among those found; `open_source` adds the flag that chooses one."""


@dataclass
class Listing:
    """The files below a folder, by their path in it with forward slashes, sorted."""

    files: list[str]
    passed_over: Counter[str] = field(default_factory=Counter)  # by reason; a hidden folder counts once


def is_junk(name: str) -> bool:
    """Whether some part of a path inside a folder is hidden, or made by the system."""
    return any(part.lower() in JUNK or (part[0] == "." and part not in (".", "..")) for part in name.split("/") if part)


def list_files(folder: Path, skip: tuple[str, ...] = ()) -> Listing:
    """Every file below `folder`, without the folders `skip` directly in it. Linked folders are followed.

    Each folder is read once, under its own path where it has one in here, so that a link to a folder above ends. Raises
    UserError where `folder` itself cannot be listed; one below it is counted.
    """
    found, seen = Listing([]), set[tuple[int, int]]()
    folders, links = [folder], list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(here))
        except OSError as error:
            if here != folder:
                found.passed_over["folders that cannot be listed"] += 1
                continue
            raise UserError(
                f"{here}: cannot be listed ({error.strerror}); mend its permissions or leave it out"
            ) from error
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = Path(entry.path).relative_to(folder).as_posix()
            if name in skip or entry.name == locks.NAME:  # a lock of our own commands is nobody's data
                continue
            if is_junk(entry.name):
                found.passed_over[HIDDEN] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif not _is_text(name):
                found.passed_over[BAD_NAME] += 1
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                found.files.append(name)
            else:
                found.passed_over["links that lead nowhere" if entry.is_symlink() else "devices"] += 1
    found.files.sort()
    return found


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_read(names: Iterable[str], passed_over: Counter[str]) -> dict[str, int]:
    """Counts for a summary: files that are of no use here, by their extension, and those passed over by reason."""
    kinds = Counter(kind if 1 < len(kind := Path(name).suffix.lower()) <= LONGEST_KIND else "other" for name in names)
    common = dict(kinds.most_common(KINDS))
    if rest := kinds.total() - sum(common.values()):
        common["other"] = common.get("other", 0) + rest
    return {NOT_READ + kind: count for kind, count in sorted((Counter(common) + passed_over).items())}


def is_of_files(name: str) -> bool:
    """Whether a count of a summary is one of files, which is not part of the sum of the rows."""
    return name.startswith(NOT_READ) or name == CAPTION_FILES

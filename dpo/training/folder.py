"""The output folder: whether it may be used, and what is cleared in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dpo.common.errors import UserError
from dpo.pages.folder import CONFIG_FILE, ENTRIES, METRICS_FILE
from dpo.settings.config import Config, Output


def check_output(config: Config) -> Path:
    """The output folder.

    Raises UserError when it cannot be written, or holds a run that is neither resumed nor replaced.
    """
    output = Path(config.output.output).expanduser()
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: {there} is not writable; choose another folder")
    known = bool(config.output.resume) and any((output / entry.name).exists() for entry in ENTRIES if entry.marks_run)
    check_apart("--output", output, config, known=known)
    found = [entry for entry in ENTRIES if (output / entry.name).exists()]
    occupied = any(entry.marks_run for entry in found)
    if occupied and not config.output.resume and not config.output.overwrite:
        raise UserError(
            f"{output} holds another run: go on with it (--resume latest), replace it (--overwrite) or name another --output"
        )
    foreign = [entry.name for entry in found if entry.guarded]
    if foreign and not occupied and not config.output.overwrite:
        raise UserError(
            f"{output} is no run and has {', '.join(foreign)}, which would be replaced: name another --output, or add --overwrite"
        )
    _try(output)
    return output


def _try(output: Path) -> None:
    """Makes the folder and a file in it, and takes both away again. Raises UserError when either is refused.

    Permissions do not tell: the superuser has them all, and a file system may refuse whatever they say.
    """
    missing = [path for path in (output, *output.absolute().parents) if not path.exists()]
    done = "cannot be made"
    try:
        output.mkdir(parents=True, exist_ok=True)
        done = "takes no file"
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: it {done} ({error.strerror}); choose another folder") from error
    finally:
        for folder in missing:
            with suppress(OSError):  # not made, or another process put something there
                folder.rmdir()


def check_apart(flag: str, folder: Path, config: Config, *, known: bool = False) -> None:
    """Raises UserError where `folder` is one of the inputs, lies inside one, or has one where a run writes.

    flag: that names `folder`. known: the folder lay where it is before this command, and only goes on.
    """
    named, data, place = config.model, config.data, folder.resolve()
    written = [(folder / entry.name).resolve() for entry in ENTRIES]
    for name, source in (
        ("--model", named.model),
        ("--unet-init", named.unet_init),
        ("--lora-init", named.lora_init),
        ("--vae", named.vae),
        ("--data", data.data),
        ("--validation-data", data.validation_data),
    ):
        if not source or not (found := Path(source).expanduser().resolve()).exists():
            continue
        if place == found and name == "--model":
            raise UserError(
                f"{flag} {folder} is the folder of the model itself, which would be replaced; name another folder"
            )
        if place == found or any(found.is_relative_to(entry) for entry in written):
            raise UserError(f"{flag} {folder} has {name} {source} in it, which would be replaced; name another folder")
        if not known and place.is_relative_to(found):
            raise UserError(f"{flag} {folder} lies inside {name} {source}, which is only read; name a folder beside it")


def clear_output(output: Path, asked: Output) -> None:
    """Makes the output folder.

    With --overwrite, deletes everything that an earlier run wrote there, and nothing else.
    """
    if asked.overwrite and not asked.resume and any((output / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)):
        for entry in [entry for entry in ENTRIES if not entry.beside or (output / entry.beside).exists()]:
            _clear(output / entry.name, entry.inside)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {output}: {error.strerror}; choose another --output") from error


def _clear(place: Path, inside: Iterable[str]) -> None:
    """Deletes a file or link, or what matches `inside` in a folder, and the folders that are empty afterwards."""
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
        return
    found = [path for pattern in inside for path in place.glob(pattern)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for folder in [*({path.parent for path in found} - {place}), place]:
        if not any(folder.iterdir()):
            folder.rmdir()

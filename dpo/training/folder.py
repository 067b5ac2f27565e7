"""The output folder: whether it may be used, and what is cleared in it."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from dpo.common.errors import UserError, reading
from dpo.common.files import made, remove, sweep
from dpo.pages.folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    ENTRIES,
    METRICS_FILE,
    SUMMARY_FILE,
    Entry,
    holds_run,
    not_of_a_run,
    read_records,
)
from dpo.settings.config import Config, Output

log = logging.getLogger("dpo")


def folder_of(config: Config) -> Path:
    """The output folder as it is named."""
    return Path(config.output.output).expanduser()


def check_output(config: Config) -> Path:
    """The output folder.

    Raises UserError when it cannot be written, or holds a run that is neither resumed nor replaced.
    """
    output = folder_of(config)
    with reading(f"--output {str(output)[:80]}", "name another folder"):  # a name may be too long to be asked for
        there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: {there} is not writable; choose another folder")
    for entry in ENTRIES:
        place = output / entry.name
        if entry.folder and place.is_symlink() and not place.exists():
            raise UserError(f"{place} is a link to a folder that is not there: make that, or remove the link")
        if not entry.folder and place.is_dir():
            raise UserError(f"{place} is a folder where a run writes a file: rename it, or name another --output")
    occupied, out = holds_run(output), config.output
    check_apart("--output", output, config, known=occupied and bool(out.resume))
    if occupied and not out.resume and not out.overwrite:
        raise UserError(
            f"{output} holds another run: go on with it (--resume latest), replace it (--overwrite) or name another --output"
        )
    if occupied and out.resume and not _goes_on_with(output, out.resume):
        raise UserError(
            f"{output} holds another run than --resume {out.resume}: go on with it (--resume latest), or name another --output"
        )
    if (others := not_of_a_run(output)) and not out.overwrite:
        raise UserError(
            f"{output} is no run and has {', '.join(others)}, which would be replaced: name another --output, or add --overwrite"
        )
    _try(output)
    return output


def _goes_on_with(output: Path, resume: str) -> bool:
    """Whether --resume names what lies in `output`: its latest checkpoint, itself, or one that it has or has set aside."""
    named = Path(resume).expanduser().resolve()
    return resume == "latest" or named == output.resolve() or named.is_relative_to((output / CHECKPOINTS).resolve())


def _try(output: Path) -> None:
    """Makes the folder and a file in it, and takes both away again. Raises UserError when either is refused.

    Permissions do not tell: the superuser has them all, and a file system may refuse whatever they say.
    """
    with made(output, "--output"):
        try:
            with tempfile.TemporaryFile(dir=output):
                pass
        except OSError as error:
            raise UserError(f"--output {output}: it takes no file ({error.strerror}); choose another folder") from error


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


def check_own(flag: str, folder: Path) -> None:
    """Raises UserError where `folder` holds a model or a run, which other files do not belong into."""
    model = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    if model or holds_run(folder):
        raise UserError(f"{flag} {folder} holds {'a model' if model else 'a run'}: name a folder of its own")


def clear_output(output: Path, asked: Output) -> None:
    """Makes the output folder, and deletes what killed processes left unfinished in it.

    With --overwrite, deletes everything that an earlier run wrote there, and nothing else; what tells that it is a run
    comes last, so that the same command finds it again after a kill. Where no run lies, what bears the names of a run's
    records, pages and images is deleted, which is said; a model's files stay until the result replaces them.
    """
    if asked.overwrite and not asked.resume:
        others = not_of_a_run(output)
        if others:
            log.warning(
                "--overwrite: no run wrote %s in %s; what this one writes replaces them", ", ".join(others), output
            )
        results = [entry for entry in ENTRIES if entry.beside and not others and (output / entry.beside).exists()]
        records = [entry for entry in reversed(ENTRIES) if not entry.beside and (entry.guarded or not others)]
        for entry in [*results, *records]:
            clear_entry(output / entry.name, entry)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {output}: {error.strerror}; choose another --output") from error
    for entry in ENTRIES:
        sweep(output, entry.name)
    sweep(output, "result")


def has_trained(folder: Path) -> bool:
    """Whether there is a run in `folder`, or what one leaves of updates that it made of any pair."""
    records = read_records(folder / METRICS_FILE)
    pairs = any(record.get("pairs", 1) for record in records if "event" not in record)
    return holds_run(folder) or (folder / SUMMARY_FILE).is_file() or pairs


def take_back(output: Path) -> None:
    """Deletes the checkpoints and settings of a run that trained nothing: its folder is free again, for other pairs too."""
    for entry in reversed(ENTRIES):
        if entry.name in (CHECKPOINTS, CONFIG_FILE):
            clear_entry(output / entry.name, entry)


def clear_entry(place: Path, entry: Entry) -> None:
    """Deletes a file or a link to one, or what a run puts into a folder, and the folders that are empty afterwards.

    A link to a folder stays, and so does the folder: it was made for the run.
    """
    if not place.is_dir():
        remove(place)
        return
    if not entry.folder:
        return
    found = [path for pattern in entry.inside for path in place.glob(pattern)]
    for path in found:
        remove(path)
    parents = {place / parent for path in found for parent in path.relative_to(place).parents} | {place}
    for folder in sorted(parents, key=lambda folder: -len(folder.parts)):
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()

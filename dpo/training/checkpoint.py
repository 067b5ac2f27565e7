"""Checkpoints: folders of safetensors and one JSON, written atomically, verified by checksum, never unpickled.

    checkpoints/step-00000500/
        policy.safetensors  optimizer.safetensors  tables.safetensors  ema.safetensors
        state.json          step, position, config, fingerprints, checksums

A folder appears under its name only when all of it is on disk, so a kill at any moment leaves the previous one intact.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import (
    beside,
    checksum,
    discard,
    disk_error,
    follow_umask,
    remove,
    sealed,
    sweep,
    sync_file,
    sync_folder,
    unseal,
    write_text,
)
from dpo.common.words import excerpt
from dpo.pages.folder import CHECKPOINTS, METRICS_FILE

log = logging.getLogger("dpo")


FORMAT = 1


NAME = re.compile(r"step-(\d{8})")


ABANDONED = "abandoned-{}"  # the checkpoints of a branch that a run went back behind


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: `tensors[group][name]` on the CPU, and the JSON object `state`."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Damaged(Exception):
    """A checkpoint that cannot be trusted: truncated, altered or incomplete."""


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, without shared memory: safetensors refuses tensors that overlap."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes one safetensors file, flushed to disk; returns its SHA-256, hexadecimal."""
    save_file(_storable(tensors), path)
    sync_file(path)
    return checksum(path)


def save(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Writes the checkpoint `folder`, which appears whole or not at all. Raises UserError when the disk is full.

    tensors: by group and name, a file for each group; state: a JSON object.
    """
    part, aside = beside(folder), beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        sums = {
            group: save_tensors(part / f"{group}.safetensors", values) for group, values in tensors.items() if values
        }
        names = {group: sorted(values) for group, values in tensors.items()}
        write_text(
            part / "state.json", sealed({"format": FORMAT, **state, "contents": names, "checksums": sums}, "seal")
        )
        follow_umask(part)
        if folder.exists():  # moved aside, not deleted: between the two renames alone neither is at its place
            os.replace(folder, aside)
        os.replace(part, folder)
        sync_folder(folder.parent)
        remove(aside)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder) from error
    finally:
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        remove(part)
    return folder


def load(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises Damaged when anything is missing, truncated or altered."""
    try:
        state, unaltered = unseal((folder / "state.json").read_text(encoding="utf-8"), "seal")
        form = state["format"]
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{folder} has no readable state.json") from error
    if form != FORMAT:
        raise Damaged(f"{folder} has checkpoint format {excerpt(form)}, this version reads {FORMAT}")
    if not unaltered:
        raise Damaged(f"{folder / 'state.json'} was altered")
    tensors: dict[str, dict[str, Tensor]] = {}
    sums, contents = state.get("checksums"), state.get("contents", {})  # earlier versions did not name the contents
    if not isinstance(sums, dict) or {group for group, names in contents.items() if names} - sums.keys():
        raise Damaged(f"{folder / 'state.json'} does not say what belongs to it")
    for group, expected in sums.items():
        path = folder / f"{group}.safetensors"
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if checksum(path) != expected:
            raise Damaged(f"{path} was truncated or altered")
        try:
            tensors[group] = load_file(path)
        except SafetensorError as error:
            raise Damaged(f"{path} is no file of tensors") from error
        if sorted(tensors[group]) != contents.get(group, sorted(tensors[group])):
            raise Damaged(f"{path} lacks tensors that belong to it")
    return Checkpoint(folder, tensors, state)


def listing(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and NAME.fullmatch(path.name))


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def find(root: Path, which: str, check: Callable[[Checkpoint], object] = lambda found: None) -> Checkpoint:
    """The checkpoint to resume: "latest" under `root`, or a path to a checkpoint, a run or its checkpoints folder.

    Of several, the newest comes first, and those of runs that had diverged last. A damaged one is skipped with a
    warning, and the one before it is taken; so is one that `check` raises Damaged for. Raises UserError when none can
    be read.
    """
    candidates = named(root, which)
    if candidates[:1] != [Path(which).expanduser()]:  # a folder of several; one that is named itself is taken as it is
        candidates = _healthy_first(candidates)
    if not candidates:
        raise UserError(f"nothing to resume: no checkpoint under {root}; start without --resume")
    reasons = []
    for path in candidates:
        try:
            found = load(path)
            check(found)
        except Damaged as error:
            reasons.append(str(error))
            log.warning("checkpoint skipped: %s%s", error, "; trying the one before" if path != candidates[-1] else "")
            continue
        return found
    others = [path for path in listing(root) if path not in candidates][::-1]
    if others:
        raise UserError(f"{reasons[0]}; others are there: --resume latest, or --resume {shlex.quote(str(others[0]))}")
    if left := [path for path in set_aside(root) if path not in candidates]:
        raise UserError(f"{reasons[0]}; a branch that was gone back from has --resume {shlex.quote(str(left[-1]))}")
    raise UserError(f"no checkpoint can be read ({reasons[0]}); start again without --resume and with --overwrite")


def named(root: Path, which: str) -> list[Path]:
    """The folders that `which` may mean, as `find` has it, newest first; none where "latest" finds none.

    Raises UserError for a folder that does not exist.
    """
    if which == "latest":
        return listing(root)[::-1]
    folder = Path(which).expanduser()
    if not folder.is_dir():
        there = listing(root)
        others = (
            f"use --resume latest or name a folder such as {shlex.quote(str(there[-1]))}"
            if there
            else (f"{root} has none: --resume latest begins the run")
        )
        raise UserError(f"no such checkpoint: {which}; {others}")
    inside = listing(folder) or listing(folder / CHECKPOINTS)  # the folder of a run, or of its checkpoints
    return inside[::-1] or [folder, *(path for path in listing(folder.parent)[::-1] if path.name < folder.name)]


def _healthy_first(newest: list[Path]) -> list[Path]:
    """Checkpoints, newest first, with those at the end that were written as the loss or the gradient was not finite."""
    diverged = [path for path in newest if _diverged(path)]
    healthy = [path for path in newest if path not in diverged]
    if diverged and healthy:
        log.warning(
            "%s was written when the run had diverged: %s comes first; name the other to go on from there",
            diverged[0],
            healthy[0],
        )
    return [*healthy, *diverged]


def _diverged(folder: Path) -> bool:
    """Whether a checkpoint says so; one that cannot be read is found damaged later."""
    return bool(read_state(folder).get("diverged"))


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON object of a checkpoint, unverified; empty where it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def go_on_from(resumed: Path, root: Path, step: int) -> None:
    """Makes `resumed`, which made `step` updates, the newest checkpoint of `root`: `latest` goes on from there after a kill too.

    What is not in its history is set aside. Of one that had been set aside itself the lines of metrics.jsonl come back with
    it. Raises OSError.
    """
    if resumed.resolve().parent == root.resolve():
        _set_aside(root, resumed, [path for path in listing(root) if path.name > folder_of(root, step).name])
        return
    place = folder_of(root, step)
    with _copy_of(resumed, place) as part:
        _set_aside(root, resumed, listing(root))
        part.replace(place)
    sync_folder(root)
    lines = resumed.parent / METRICS_FILE
    if lines.is_file() and resumed.resolve().parent.parent == root.resolve():
        write_text(root.parent / METRICS_FILE, lines.read_text(encoding="utf-8"))


def copy_to(found: Path, place: Path) -> None:
    """Puts a checkpoint at `place` too, whole or not at all. Raises OSError."""
    with _copy_of(found, place) as part:
        part.replace(place)
    sync_folder(place.parent)


@contextmanager
def _copy_of(found: Path, place: Path) -> Iterator[Path]:
    """A copy of a checkpoint beside `place`, to be renamed in the block. Its files are linked where that can be: none is ever changed."""
    part = beside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(found, part, copy_function=_link_or_copy)
        yield part
    finally:
        remove(part)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _set_aside(root: Path, resumed: Path, moved: list[Path]) -> None:
    """Moves checkpoints of `root` to a folder abandoned-N there, into which `listing` does not look, and says so.

    The run's lines of metrics.jsonl are kept beside them.
    """
    if not moved:
        return
    place = next(place for i in itertools.count(1) if not (place := root / ABANDONED.format(i)).exists())
    place.mkdir()
    with suppress(FileNotFoundError):
        shutil.copyfile(root.parent / METRICS_FILE, place / METRICS_FILE)
    for path in reversed(moved):  # a kill between two leaves the older ones, which are no later than what is moved
        os.replace(path, place / path.name)
    sync_folder(root)
    log.warning(
        "going on from %s: %s %s moved to %s", resumed, ", ".join(path.name for path in moved),
        "was" if len(moved) == 1 else "were", place,
    )  # fmt: skip


def set_aside(root: Path) -> list[Path]:
    """The checkpoints that were set aside under `root`, the newest branch and its newest last."""
    number = re.compile(ABANDONED.format(r"(\d+)"))
    branches = (
        (int(found[1]), path) for path in root.glob(ABANDONED.format("*")) if (found := number.fullmatch(path.name))
    )
    return [path for _, branch in sorted(branches) for path in listing(branch)]


def prune(root: Path, limit: int | None) -> None:
    """Keeps the newest `limit` checkpoints (None or 0: all) and deletes the unfinished ones of killed writes.

    What a newest one names as the best weights so far stays too.
    """
    sweep(root, "step-*")
    if limit:
        there = listing(root)
        best = {(read_state(path).get("best") or {}).get("step") for path in there[-limit:]}
        for path in there[:-limit]:
            if path not in [folder_of(root, step) for step in best if step is not None]:
                discard(path)


def _leaves(entry: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings: bitsandbytes keeps its quantised state one level down."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}.{key}")
        elif value is not None:
            yield f"{prefix}.{key}", value


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict -> (tensors by "index.key" or "index.outer.key", the rest, fit for JSON).

    csrc_triton's AdamW8bit names a "format": its state is one set of tensors for all parameters.
    """
    if "format" in state:
        return dict(state["state"]), {"format": state["format"], "param_groups": state["param_groups"]}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entry in state["state"].items():
        for name, value in _leaves(entry, str(index)):
            (tensors if isinstance(value, Tensor) else numbers)[name] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def unpack(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `pack`."""
    if "format" in rest:
        return {"format": rest["format"], "state": dict(tensors), "param_groups": rest["param_groups"]}
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *rest["numbers"].items()]:
        index, *outer, key = name.split(".")
        entry = state.setdefault(int(index), {})
        for level in outer:
            entry = entry.setdefault(level, {})
        entry[key] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Puts a packed state back exactly: `load_state_dict` alone would round fp32 state to the dtype of bf16 weights.

    Rates, decay and the like stay those that `optimizer` was built with: they may change on resume.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(unpack(tensors, rest))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    if "format" in rest:
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        index, *_, key = name.split(".")
        state = optimizer.state[parameters[int(index)]]
        if state[key].dtype != value.dtype:
            state[key] = value.to(state[key].device)


def copy_into(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copies saved tensors into the live ones. Raises UserError, naming `what`, when names, shapes or dtypes differ."""
    if list(parameters) != list(saved) and set(parameters) != set(saved):
        raise UserError(
            f"the checkpoint's {what} belongs to another model or other LoRA settings; start without --resume"
        )
    with torch.no_grad():
        for name, live in parameters.items():
            if live.shape != saved[name].shape or live.dtype != saved[name].dtype:
                raise UserError(
                    f"the checkpoint's {what} has {name} as {saved[name].dtype} {tuple(saved[name].shape)}, the run wants "
                    f"{live.dtype} {tuple(live.shape)}; resume with the settings it was made with"
                )
            live.copy_(saved[name])

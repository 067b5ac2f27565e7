"""What a run's folder says of one of its updates: the settings it had, the state before it, its figures. Only reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo.common.errors import UserError
from dpo.common.files import is_there
from dpo.common.hub import is_hub_id
from dpo.common.words import first_line
from dpo.pages.folder import CHECKPOINTS, CONFIG_FILE, RunFolder, read_json, read_run, read_settings
from dpo.settings.config import Config, change, flat_settings, from_mapping, of_before
from dpo.training import checkpoint
from dpo.training.state import check_complete

MACHINE = ("kernels", "channels_last", "offload")  # settings that were decided for the device of the run

log = logging.getLogger("dpo")


def updates_made(run: RunFolder) -> int:
    """Updates that the run has made, as its metrics and its checkpoints say."""
    return max([run.done, *(_step(path) for path in _kept(run.folder))])


def read(folder: Path, update: int) -> RunFolder:
    """The run in `folder`. Raises UserError where there is none, or it has not come to `update`.

    The update after the last one counts as one: it may be the one that failed.
    """
    run = read_run(folder)
    made = updates_made(run)
    last = min(made + 1, run.wanted) if run.wanted else made + 1
    if not 1 <= update <= max(made, last):
        raise UserError(f"{folder} has made {made} updates: give --update a number from 1 to {max(made, last)}")
    return run


def settings(run: RunFolder, update: int) -> Config:
    """The settings with which the run made `update`. Raises UserError where its folder does not say.

    They may have changed where the run was resumed. So they are those of the first checkpoint from that update on, and
    where there is none, those of config.toml, which the last start of the run wrote.
    """
    later = [path for path in _kept(run.folder) if _step(path) >= update]
    saved = next((found for path in later if (found := _state(path).get("config"))), None)
    if saved is None:
        saved = flat_settings(read_settings(run.folder))
    if not saved:
        raise UserError(f"{run.folder} does not say with which settings it was made: {CONFIG_FILE} is missing")
    return from_mapping(of_before(saved))


def processes(run: RunFolder, update: int) -> int:
    """How many processes made `update`: the pairs of an update are those of all, a pass's those of one."""
    optim = settings(run, update).optim
    return max(1, optim.pairs // (optim.batch_size * optim.accumulation))


def on_this_machine(config: Config, run: RunFolder, asked: Mapping[str, Any]) -> Config:
    """`config` with the places that are `asked` for, on a device that is here. Raises UserError.

    asked: settings by name. The device of the run is taken where it is here; on another kind of device its own layout,
    kernels and offloading are decided anew.
    """
    before, gpu = config.runtime.device, torch.cuda.is_available()
    if run.embedded:
        config = change(config, model=None)
    device = asked.get("device")
    if device is None:
        device = before if before == "cpu" else "auto"
        if before.startswith("cuda") and not gpu:
            log.warning("the run was made on a GPU and torch sees none here: replaying on the CPU, not bit for bit")
    changes: dict[str, Any] = {**asked, "device": device, "resume": None, "overwrite": False, "sharding": "off"}
    changes["cuda_graph"] = False  # its captured kernels do the same, and a few updates do not pay for a capture
    there = device.startswith("cuda") or (device == "auto" and gpu)
    if there != before.startswith("cuda"):
        changes |= dict.fromkeys(MACHINE, "auto")
    return change(config, **changes)


def gone(config: Config) -> list[str]:
    """The flags that name files of the run's which are not here: its data and model may have moved since."""
    named = {
        "--data": config.data.data,
        "--validation-data": config.data.validation_data,
        "--model": config.model.model,
    }
    return [flag for flag, place in named.items() if place and not is_there(place) and not is_hub_id(place)]


def state_before(run: RunFolder, update: int) -> checkpoint.Checkpoint | None:
    """The last whole checkpoint of a state before `update`; None where none is left, and the start has to do.

    Checkpoints that the run went back behind are not of its history.
    """
    for path in [path for path in _kept(run.folder) if _step(path) < update][::-1]:
        try:
            saved = checkpoint.load(path)
            check_complete(saved)
        except (checkpoint.Damaged, OSError) as error:  # a run that goes on deletes old ones meanwhile
            log.warning("checkpoint skipped: %s; trying the one before", first_line(error))
            continue
        return saved
    return None


def pairs_of_run(run: RunFolder, update: int) -> str | None:
    """The fingerprint of the training pairs that the run had at `update`; None where no checkpoint says."""
    later = [path for path in _kept(run.folder) if _step(path) >= update]
    return next((found for path in later if (found := (_state(path).get("fingerprints") or {}).get("data"))), None)


def cost(run: RunFolder, first: int, last: int) -> float | None:
    """Seconds that the run took for updates `first` to `last`, from the mean of those logged; None without any."""
    taken = [u["seconds"] for u in run.updates if first <= u["step"] <= last and u.get("seconds") is not None]
    return sum(taken) / len(taken) * (last - first + 1) if taken else None


def compared(run: RunFolder, made: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether figures that were `made` again, by update, are those in metrics.jsonl, bit for bit.

    "updates": how many of them are logged; "first" where they first differ: update, figure, and both values; None where
    they do not.
    """
    logged = {record["step"]: record for record in run.updates if record["step"] in made}
    first = None
    for step in sorted(logged):
        names = [name for name, value in made[step].items() if name in logged[step] and logged[step][name] != value]
        if names:
            name = names[0]
            first = {"update": step, "figure": name, "run": logged[step][name], "replay": made[step][name]}
            break
    return {"updates": len(logged), "first": first}


def figures_around(run: RunFolder, first: int, last: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """What metrics.jsonl has of updates `first` to `last`: "step" and the figures of these `names`."""
    found = [record for record in run.updates if first <= record["step"] <= last]
    return [{"step": record["step"], **{name: record.get(name) for name in names}} for record in found]


def _kept(folder: Path) -> list[Path]:
    return checkpoint.listing(folder / CHECKPOINTS)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _state(path: Path) -> dict[str, Any]:
    return read_json(path / "state.json")

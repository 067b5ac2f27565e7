"""The checkpoint of a run: what it holds, how it is made from a Run and put back into one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.methods import METHODS
from dpo.pages.folder import CHECKPOINTS
from dpo.settings import resolve, rules
from dpo.settings.config import Config, Output, change, flatten, from_mapping, of_before, specs
from dpo.training import best, checkpoint
from dpo.training.run import Run

TRAINED = ("method", "optim", "lora")  # the groups of settings that say how the weights were made

# What every checkpoint of a run holds, of whatever version: `snapshot` writes it, `check_complete` asks for it.
GROUPS = {"policy": (), "tables": ("correction",)}  # and tensors that each must have
KEYS: dict[str, type | tuple[type, ...]] = {
    "step": int, "position": int, "config": dict, "fingerprints": dict, "optimizer": dict, "scaler": (dict, type(None)),
}  # fmt: skip

log = logging.getLogger("dpo")


def check_complete(saved: checkpoint.Checkpoint) -> None:
    """Raises Damaged where a checkpoint lacks what a run goes on from, though all that it names is there."""
    state, tensors = saved.state, saved.tensors
    lacking = [name for name, kind in KEYS.items() if name not in state or not isinstance(state[name], kind)]
    lacking += [f"{group}.safetensors" for group in GROUPS if not tensors.get(group)]
    lacking += [
        name for group, names in GROUPS.items() if tensors.get(group) for name in names if name not in tensors[group]
    ]
    if not lacking:
        groups = state["optimizer"].get("param_groups", [])  # csrc_triton's AdamW8bit does not number its weights
        if "format" not in state["optimizer"] and sum(len(g["params"]) for g in groups) != len(tensors["policy"]):
            lacking.append("weights that its optimizer trains")
        untouched = not state["step"] or state.get("contents", {}).get("optimizer") == []  # no pair could be used yet
        if not untouched and "optimizer" not in tensors:
            lacking.append("optimizer.safetensors")
        if "ema" in tensors and tensors["ema"].keys() != tensors["policy"].keys():
            lacking.append("averaged weights")
    if lacking:
        raise checkpoint.Damaged(f"{saved.path} is incomplete: it lacks {', '.join(lacking)}")


class Held(NamedTuple):
    """What a run has trained, whole: of shards on the host of the first process, and nothing in the others."""

    policy: dict[str, Tensor]
    averaged: dict[str, Tensor]  # empty without averaging
    optimizer: dict[str, Any]


def held(run: Run) -> Held:
    """The weights and the optimizer's state of `run`. Of shards all processes must ask at once, each gives its own."""
    updater, shards = run.updater, run.updater.shards
    if shards is not None:
        policy = dict(shards.whole(updater.parameters))
        averaged = dict(shards.whole(updater.ema)) if updater.ema else {}
        return Held(policy, averaged, shards.state_dict(updater.optimizer) or {})
    policy = dict(zip(updater.names, updater.parameters, strict=True))
    averaged = dict(zip(updater.names, updater.ema, strict=True)) if updater.ema else {}
    return Held(policy, averaged, updater.optimizer.state_dict())


def contents(run: Run, found: Held) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a checkpoint of the run with `found` in it holds: tensors by group and name, and a JSON object."""
    optimizer_tensors, optimizer_rest = checkpoint.pack(found.optimizer)
    tensors = {
        "policy": found.policy,
        "optimizer": optimizer_tensors,
        "tables": run.table.tensors(),
        "ema": found.averaged,
    }
    state = {
        "step": run.done,
        "position": run.position,
        "config": flatten(run.config),
        "fingerprints": run.fingerprints,
        "optimizer": optimizer_rest,
        "scaler": run.updater.scaler.state_dict() if run.updater.scaler else None,
        "versions": {"torch": torch.__version__},
        **({"norm_before": run.updater.release.before.item()} if run.updater.release else {}),
        **({"following": {one.name: one.as_json() for one in run.following}} if run.following else {}),
        **({"best": run.best.as_json()} if run.best is not None else {}),
        **({"measured": run.measured} if run.held_out is not None else {}),
    }
    return tensors, state


def snapshot(run: Run, found: Held | None = None, *, emergency: bool = False, diverged: bool = False) -> Path:
    """Writes a checkpoint of the run, `found` (else: `held`) in it, and deletes the oldest ones beyond the limit; its folder.

    An emergency deletes none: what is newest then may be the worst. Of a run that has diverged the checkpoint says so,
    and does not replace one that was made of the same update before.
    """
    path = checkpoint.folder_of(run.checkpoints, run.done)
    if diverged and path.exists():
        return path
    tensors, state = contents(run, found or held(run))
    if diverged:
        state |= {"diverged": True}
    checkpoint.save(path, tensors, state)
    if run.best is not None and run.best.step == run.done:
        run.best.checksums = best.weights_of(path)
    if not emergency:
        checkpoint.prune(run.checkpoints, run.config.output.checkpoints_limit)
    return path


def as_before(config: Config, saved: checkpoint.Checkpoint) -> Config:
    """`config` with what it leaves open on the pairs as it was in the checkpoint's run.

    Then no pair changes sides, and a dropped caption stays what it was.
    """
    data, before = config.data, from_mapping(of_before(saved.state["config"])).data
    names = []
    if data.validation_data is None and data.validation_fraction is None:
        names += ["validation_data", "validation_split", "validation_fraction", "validation_by"]
    if data.dropped_caption == "auto":
        names += ["dropped_caption"]
    return change(config, **{name: getattr(before, name) for name in names})


def checkpointing_before(output: Output, folder: Path) -> str | None:
    """Which blocks the run that is resumed computes again, as its newest checkpoint has it; None where nothing says so.

    folder: of the run. Raises UserError for a checkpoint that does not exist.
    """
    if output.resume is None:
        return None
    configs = (
        checkpoint.read_state(path).get("config") for path in checkpoint.named(folder / CHECKPOINTS, output.resume)
    )
    settings = next((config for config in configs if isinstance(config, dict)), {})
    before = settings.get("checkpointing")
    return before if isinstance(before, str) and before != "auto" else None


def check_resume(config: Config, saved: checkpoint.Checkpoint) -> list[str]:
    """Which settings changed since the checkpoint. Raises UserError for changes that would make it another run."""
    before = from_mapping(of_before(saved.state["config"]))
    allowed, refused = rules.resume_changes(flatten(before), flatten(config), specs())
    if refused:
        raise UserError(
            f"cannot resume {saved.path} with other settings: {', '.join(refused)}; set them back or start anew"
        )
    return allowed


# What a run is made from, by the name of its fingerprint, as a refusal words it.
SAME = {
    "model": "another model than {model}; name that one or start anew",
    "start": "other starting weights than --unet-init and --lora-init give now; put those files back or start anew",
    "reference": "another reference than the weights that are compared with now; put those files back or start anew",
    "vae": "another VAE than {vae} gives now; put its files back or start anew",
    "text": "other text encoders or tokenizers than {model} has now; put their files back or start anew",
}


def _check_same(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Raises UserError where the run is made from other weights than the checkpoint's; other pairs or images are said.

    Checkpoints of earlier versions lack some fingerprints: what is not known is not compared.
    """
    before, now, named = saved.state["fingerprints"], run.fingerprints, run.config.model
    for name, reason in SAME.items():
        hashes = name, f"{name}_checksum"
        if any(key in before and key in now and before[key] != now[key] for key in hashes):
            about = reason.format(model=named.model, vae=f"--vae {named.vae}" if named.vae else named.model)
            raise UserError(f"{saved.path} was trained from {about}")
    if "positions" in now and "positions" not in before:
        log.warning(
            "the checkpoint is of an earlier version, which rounded the positions in the text encoder to half precision: the run "
            "goes on with exact ones"
        )
    if before["data"] != now["data"]:
        log.warning(
            "the training %s differ from the checkpoint's: their order starts from position %d of the new set",
            run.things,
            saved.state["position"],
        )
    elif before.get("images", now.get("images")) != now.get("images"):
        log.warning(
            "image files of the training %s were changed since the checkpoint: it goes on with the new ones", run.things
        )
    elif before.get("image_times", now.get("image_times")) != now.get("image_times"):
        log.info(
            "the image files have other times than at the checkpoint; their sizes and the contents looked at do not"
        )


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Puts a checkpoint into a freshly built run, bit for bit; training goes on with the batch after it.

    Raises UserError when the checkpoint belongs to another model, start, reference, VAE or text encoder.
    """
    state, tensors = saved.state, saved.tensors
    _check_same(run, saved)
    updater = run.updater
    if (shards := updater.shards) is not None:  # of each whole tensor this process's rows
        tensors = {**tensors, **{group: shards.put(tensors[group]) for group in ("policy", "ema") if group in tensors}}
        tensors["optimizer"] = shards.put_state(tensors.get("optimizer", {}))
    checkpoint.copy_into(dict(zip(updater.names, updater.parameters, strict=True)), tensors["policy"], "policy")
    if updater.ema:
        checkpoint.copy_into(dict(zip(updater.names, updater.ema, strict=True)), tensors["ema"], "averaged weights")
    checkpoint.load_optimizer(updater.optimizer, tensors.get("optimizer", {}), state["optimizer"])
    if updater.scaler is not None and state["scaler"]:
        updater.scaler.load_state_dict(state["scaler"])
    if updater.release is not None:  # a run that went on without release until now knows no norm to clip by
        updater.release.before.fill_(state.get("norm_before", 0.0))
    for one in run.following:
        if (before := state.get("following", {}).get(one.name)) is not None:  # otherwise it begins to follow now
            one.restore(before)
    run.table = run.table.restored(tensors["tables"])
    if run.table.start is None and METHODS[run.config.method.method].correction:
        log.info(
            "the checkpoint is of an earlier version: its correction table goes on as it began, one entry a timestep "
            "and without bias correction"
        )
    run.done, run.position, run.resumed = state["step"], state["position"], saved.path
    run.measured = state.get("measured", run.done)  # a checkpoint of an earlier version does not say
    _say_rate(run, from_mapping(of_before(state["config"])))
    log.info(
        "resumed %s: %s done, %s seen", saved.path, number_of(run.done, "updates"), number_of(run.position, run.things)
    )


def _say_rate(run: Run, before: Config) -> None:
    """Warns where the next update has another learning rate than by the settings of the checkpoint."""
    if run.done >= run.total:
        return
    old = replace(run, config=before, total=resolve.total_steps(before, len(run.source))).learning_rate()
    if (new := run.learning_rate()) != old:
        log.warning("learning rate of update %d: %g by the checkpoint's schedule, now %g", run.done + 1, old, new)


def keep_trained(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Makes a restored run without updates left the one that was trained: its length, method, optimizer and adapters.

    Settings that changed since its last update have trained nothing, so neither they nor this process enter its files.
    """
    before = from_mapping(of_before(saved.state["config"]))
    trained = {name: value for name, value in flatten(before).items() if specs()[name].group in TRAINED}
    run.config, run.total, run.complete = change(run.config, **trained), run.done, True

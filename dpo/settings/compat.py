"""Command lines of other trainers: what their flags become here, and each script's own defaults and meanings.

Known are the diffusers scripts (`--compat hf-sd15`, `--compat hf-sdxl`) and the Salesforce one (`--compat sf`). Plain
renames are the `aliases` of `dpo.settings.config`; this file holds the flags that need more than another name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo.common.errors import UserError
from dpo.settings.config import specs
from dpo.settings.fields import brief, coerce

PEERS = ("hf-sd15", "hf-sdxl", "sf")


class Foreign(NamedTuple):
    """A peer's flag: the settings it becomes, a note for the log, or the reason why it is refused."""

    switch: bool = False  # takes no value
    sets: Mapping[str, Any] = {}
    note: str = ""
    refuse: str = ""
    harmless: tuple[str, ...] = ()  # values that ask for nothing: accepted where the flag is refused


FOREIGN: dict[str, Foreign] = {
    "beta_dpo": Foreign(),
    "enable_xformers_memory_efficient_attention": Foreign(switch=True, sets={"attention": "xformers"}),
    "gradient_checkpointing": Foreign(switch=True, sets={"checkpointing": "on"}),
    "use_8bit_adam": Foreign(switch=True, sets={"optimizer": "adamw8bit"}),
    "use_adafactor": Foreign(switch=True, sets={"optimizer": "adafactor"}),
    "random_crop": Foreign(switch=True, sets={"crop": "random"}),
    "no_hflip": Foreign(switch=True, sets={"flip": False}),
    "sft": Foreign(switch=True, sets={"method": "sft"}),
    "sdxl": Foreign(switch=True, sets={"family": "sdxl"}),
    "is_turbo": Foreign(switch=True, sets={"timesteps": "turbo"}),
    "report_to": Foreign(),
    "run_validation": Foreign(switch=True),
    "local_rank": Foreign(note="torchrun says it"),
    "hard_skip_resume": Foreign(switch=True, note="a resume never replays batches here"),
    "hub_token": Foreign(note="it is not kept; log in with `hf auth login` or set HF_TOKEN"),
    "logging_dir": Foreign(note="logs are written to the output folder"),
    "prior_generation_precision": Foreign(note="the diffusers script does not use it either"),
    "lr_num_cycles": Foreign(note="it belongs to cosine_with_restarts, which is not offered"),
    "lr_power": Foreign(note="it belongs to polynomial, which is not offered"),
    "image_column": Foreign(
        note="a pair has two images; name their columns with --chosen-column and --rejected-column"
    ),
    "noise_offset": Foreign(
        refuse="offset noise is not the noise that the model predicts: leave it out",
        harmless=("0", "0.0"),
    ),
    "input_perturbation": Foreign(
        refuse="the loss compares with the very noise that was added: leave it out",
        harmless=("0", "0.0"),
    ),
    "choice_model": Foreign(
        refuse="pairs are ranked before training: score them once and pass the result with --chosen-column and --rejected-column",
        harmless=("",),
    ),
    "dreamlike_pairs_only": Foreign(
        switch=True,
        refuse="filter the pairs beforehand (columns model_0 and model_1 name the generator) and pass them with --data",
    ),
}


# Values that a peer names otherwise: setting -> the peer's word -> ours.
WORDS = {"scheduler": {"constant_with_warmup": "constant"}, "precision": {"no": "fp32"}}


NOT_OFFERED = {
    "cosine_with_restarts": "use cosine or linear",
    "polynomial": "use linear (the same at its default power) or cosine",
    "piecewise_constant": "use constant, linear or cosine",
}


REPORT_TO = {
    "tensorboard": {"tensorboard": True, "wandb": False},
    "wandb": {"tensorboard": False, "wandb": True},
    "all": {"tensorboard": True, "wandb": True},
    "none": {"tensorboard": False, "wandb": False},
}


_HF = {
    "lora": True,
    "rank": 4,
    "split": "validation",
    "flip": True,
    "timesteps": "all",
    "beta": 5000.0,
    "optimizer": "adamw",
    "learning_rate": 5e-4,
    "batch_size": 4,
    "epochs": 1.0,
    "precision": "fp32",
    "vae_batch": 8,
    "output": "diffusion-dpo-lora",
    "checkpoint_every": 500,
    "checkpoints_limit": 0,
    "validate_every": 200,
    "sample_steps": 25,
    "tensorboard": True,
    "validation_fraction": 0.0,
    "warmup_start": "zero",
}


_SF = {
    "family": "sd",
    "split": "train",
    "resolution": 512,
    "flip": True,
    "caption_dropout": 0.2,
    "dropped_caption": "empty",
    "timesteps": "all",
    "beta": 5000.0,
    "optimizer": "adamw",
    "learning_rate": 1e-8,
    "batch_size": 1,
    "steps": 2000,
    "warmup": 500,
    "precision": "fp16",
    "output": "sd-model-finetuned",
    "checkpoint_every": 500,
    "checkpoints_limit": 0,
    "resume": "latest",
    "tensorboard": True,
    "project": "tuning",
    "validation_fraction": 0.0,
    "warmup_start": "zero",
}


_SF_SDXL = {"family": "sdxl", "resolution": 1024, "optimizer": "adafactor", "checkpointing": "on"}


_TURBO = {"timesteps": "turbo"}


_DIFFERENCES = {
    "hf-sd15": "ties are left out (there: wins of jpg_0), the two images of a pair are mirrored together, and "
    "--max_train_samples takes the first pairs (there: a random choice)",
    "hf-sdxl": "ties are left out (there: wins of jpg_0), each image keeps its own size and crop in the conditioning, and "
    "--max_train_samples takes the first pairs (there: a random choice)",
    "sf": "the reference has the policy's precision, the two images of a pair are mirrored together, SDXL is told each "
    "image's own size and crop and its VAE stays in fp32 under fp16, pairs of every split are shuffled (there: of train "
    "alone), and --max_train_samples takes the first pairs (there: a random choice)",
}


_PAGE = """# Flags of other trainers

Command lines of the diffusers scripts (`train_diffusion_dpo.py`, `train_diffusion_dpo_sdxl.py`) and of the Salesforce script
(`train.py`) run here. With `--compat hf-sd15`, `--compat hf-sdxl` or `--compat sf` they also keep that script's defaults and
meanings; without it our own hold, and the log says where they differ. Two flags that set one setting must agree; of one flag
given twice the last holds.

`--compat hf-sd15` and `hf-sdxl` hold no pairs out, as those scripts: `--validation-fraction 0.1` or `--validation-data` adds a held-out
accuracy at the interval of `--validate-every`. On the model inside the package, where a run ends by drawing and judging its report prompts,
`--no-judge` leaves that out.

beta belongs to the *mean* of an error over the latents' elements, as in these scripts and in Flow-Factory, verl-omni and flow_grpo.
SimpleTuner sums by default: its beta times the number of elements (65,536 for SDXL at 1024 pixels, 262,144 for SD 3 and FLUX.1) is the
one to give here, and its `auto` is `--target-gradient-factor` (docs/method.md).

This page is written by `python -m dpo.settings.compat > docs/flags.md`.

"""


def defaults(peer: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The peer's own defaults for a command line that asks for these settings."""
    if peer == "hf-sd15":
        return _HF | {"family": "sd", "resolution": 512, "project": "diffusion-dpo-lora"}
    if peer == "hf-sdxl":
        own = {"family": "sdxl", "resolution": 1024, "project": "diffusion-dpo-lora-sdxl", "vae_precision": "fp32"}
        return _HF | own
    model = str(changes.get("model") or "").lower()
    return _SF | (_SF_SDXL if changes.get("family") == "sdxl" else {}) | (_TURBO if "turbo" in model else {})


def translate(given: Mapping[str, Any], peer: str | None) -> tuple[dict[str, Any], list[str]]:
    """Settings from flags as spelled (snake case), and lines for the log.

    Raises UserError for a peer's flag or value that is not offered, and for two flags that set one setting differently.
    """
    notes: list[str] = []
    given = _one_data_set(given, peer, notes)
    changes = _foreign(given, notes) | _own(given)
    _words(given, changes)
    _beta(given, changes, peer, notes)
    _validation(given, changes)
    _clipping(given, changes, peer, notes)
    if peer:
        _warmup(given, changes, peer, notes)
        notes.insert(0, f"--compat {peer}: that script's defaults and meanings, except that {_DIFFERENCES[peer]}")
    else:
        notes += _our_meanings(given, changes)
    if became := _became(given, changes):
        notes.append(f"their flags here: {'; '.join(became)}")
    return changes, notes


BECOMES = {"beta_dpo": ("beta",), "report_to": ("tensorboard", "wandb"), "run_validation": ("sample_every",)}


def _became(given: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """What each flag of a peer was turned into, as "--beta_dpo 5000 is beta 5000"."""
    found = []
    for flag, value in given.items():
        own = [name for name, spec in specs().items() if flag in spec.meta["aliases"]]
        names = own or BECOMES.get(flag) or tuple(FOREIGN[flag].sets if flag in FOREIGN else ())
        said = ", ".join(f"{name} {_shown(coerce(specs()[name], changes[name]))}" for name in names if name in changes)
        if said and value is not False:
            found.append(f"{_spelled(flag, value)} is {said}")
    return found


def _one_data_set(given: Mapping[str, Any], peer: str | None, notes: list[str]) -> Mapping[str, Any]:
    """The flags without --train_data_dir where the Salesforce script would ignore it."""
    if peer != "sf" or not {"dataset_name", "train_data_dir"} <= set(given):
        return given
    notes.append("--train_data_dir has no effect beside --dataset_name, as in that script")
    return {name: value for name, value in given.items() if name != "train_data_dir"}


def _own(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags name, by whichever spelling."""
    changes = {}
    for name, spec in specs().items():
        found = [spelling for spelling in (name, *spec.meta["aliases"]) if spelling in given]
        if found:
            changes[name] = given[found[0]]
        asked = {spelling: given[spelling] for spelling in found}
        asked |= {flag: FOREIGN[flag].sets[name] for flag in given if flag in FOREIGN and name in FOREIGN[flag].sets}
        _agree(name, asked)
    return changes


def _agree(name: str, asked: Mapping[str, Any]) -> None:
    """Raises UserError for flags that set one setting to different values. asked: value by flag, in snake case."""
    if len(asked) < 2:
        return
    values = [coerce(specs()[name], _word(name, flag, value)) for flag, value in asked.items()]
    if any(value != values[0] for value in values):
        said = " and ".join(_spelled(flag, value) for flag, value in asked.items())
        raise UserError(f"{said} set one setting, {name}, to different values: give one")


def _spelled(flag: str, value: Any) -> str:
    """A flag as it stands on command lines: ours with hyphens, those of the peers with underscores."""
    word = flag.replace("_", "-") if flag in specs() else flag
    if flag in FOREIGN and FOREIGN[flag].switch:
        return f"--{word}"
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word} {' '.join(value) if isinstance(value, list) else value}"


def _foreign(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in given.items():
        flag = FOREIGN.get(name)
        if flag is None or value in flag.harmless or value is False:
            continue
        if flag.refuse:
            raise UserError(f"--{name}: {flag.refuse}")
        if flag.note:
            notes.append(f"--{name} has no effect: {flag.note}")
        changes |= flag.sets
    if "report_to" in given:
        changes |= _report_to(str(given["report_to"]))
    return changes


def _report_to(tracker: str) -> dict[str, Any]:
    if tracker.lower() not in REPORT_TO:
        raise UserError(f"--report_to {tracker}: expected one of {', '.join(REPORT_TO)}")
    return REPORT_TO[tracker.lower()]


def _words(given: Mapping[str, Any], changes: dict[str, Any]) -> None:
    """Puts our word for a value in the place of a peer's. Raises UserError for a value that is not offered."""
    for name in changes:
        flag = next((one for one in (name, *specs()[name].meta["aliases"]) if one in given), name)
        changes[name] = _word(name, flag, changes[name])


def _word(name: str, flag: str, value: Any) -> Any:
    """The value of a setting in our words; `flag` is the one that gave it."""
    if name == "scheduler" and value in NOT_OFFERED:
        raise UserError(f"{_spelled(flag, value)}: not offered, {NOT_OFFERED[value]}")
    words = WORDS.get(name, {})
    return words[value] if isinstance(value, str) and value in words else value


def _beta(given: Mapping[str, Any], changes: dict[str, Any], peer: str | None, notes: list[str]) -> None:
    """--beta_dpo as beta. diffusers' SD1.5 script leaves the 1/2 out of the loss: its beta is twice as strong."""
    if "beta_dpo" not in given:
        return
    beta = coerce(specs()["beta"], given["beta_dpo"])
    doubled = beta * 2 if beta is not None and peer == "hf-sd15" else beta
    if "beta" in given and coerce(specs()["beta"], given["beta"]) != doubled:
        raise UserError(
            f"--beta {given['beta']} and --beta_dpo {given['beta_dpo']} (beta {doubled:g} here) set one setting, beta, to "
            "different values: give one"
        )
    changes["beta"] = doubled
    if peer == "hf-sd15":
        notes.append(
            f"--beta_dpo {beta:g} is beta = {changes['beta']:g} here: that script leaves out the 1/2 of the published loss"
        )


def _validation(given: Mapping[str, Any], changes: dict[str, Any]) -> None:
    """--run_validation draws images in the diffusers scripts, so it turns on sample images here."""
    if given.get("run_validation") and "sample_every" not in given:
        changes["sample_every"] = changes.get("validate_every", 200)


def _clipping(given: Mapping[str, Any], changes: dict[str, Any], peer: str | None, notes: list[str]) -> None:
    """The Salesforce script does not clip the gradient with --use_adafactor (with Adafactor by --sdxl alone it does)."""
    if not given.get("use_adafactor"):
        return
    if peer == "sf":
        if "max_grad_norm" in given:
            notes.append("--max-grad-norm has no effect beside --use_adafactor, as in that script")
        changes["max_grad_norm"] = 0.0
    elif peer is None and "max_grad_norm" not in given:
        notes.append(
            "the gradient is clipped; in the Salesforce script it is not with --use_adafactor (--max-grad-norm 0)"
        )


def _warmup(given: Mapping[str, Any], changes: dict[str, Any], peer: str, notes: list[str]) -> None:
    """Those scripts warm up for 500 updates unless told otherwise, but never with the plain `constant` scheduler."""
    word = given.get("lr_scheduler", given.get("scheduler", "constant_with_warmup" if peer == "sf" else "constant"))
    if word == "constant":
        if str(changes.get("warmup", 0)) != "0":
            notes.append("no warm-up: that script has none with --lr_scheduler constant (constant_with_warmup has)")
        changes["warmup"] = 0
    else:
        changes.setdefault("warmup", 500)


def _our_meanings(given: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Lines for the log on flags of a peer that mean something else here without --compat."""
    notes = []
    if {"pretrained_model_name_or_path", "dataset_name", "train_data_dir"} & set(given):
        notes.append(
            "flags of another trainer with our meanings: full fine-tuning unless --lora, split train, no mirroring, "
            "no caption dropout, ties left out; --compat hf-sd15, hf-sdxl or sf takes that script's instead"
        )
    if "beta_dpo" in given:
        notes.append(
            "--beta_dpo is the beta of the published loss, with its 1/2; in diffusers' SD1.5 script 2500 is 5000 here"
        )
    if str(changes.get("warmup", 0)) != "0" and given.get("lr_scheduler") == "constant":
        notes.append("the learning rate warms up; in the diffusers scripts --lr_scheduler constant has no warm-up")
    if "sdxl" in given:
        notes.append(
            "--sdxl only says the architecture; in the Salesforce script it also means Adafactor and checkpointing"
        )
    if "validation_steps" in given and "run_validation" not in given:
        notes.append(
            "--validation_steps is the interval of the held-out accuracy; --run_validation or --sample-every draws images too"
        )
    return notes


def flags_page() -> str:
    """docs/flags.md: every flag of the peers and what it becomes, and each peer's defaults."""
    rows = [(alias, f"`{spec.flag}`") for spec in specs().values() for alias in spec.meta["aliases"]]
    rows += [(name, _meaning(name, flag)) for name, flag in FOREIGN.items()]
    flags = "".join(f"| `--{name}` | {meaning} |\n" for name, meaning in sorted(rows))
    page = _PAGE + "## What each flag becomes\n\n| their flag | here |\n|---|---|\n" + flags
    page += "\n`--revision`, `--variant`, `--seed`, `--resolution`, `--learning_rate` and the others keep their names; values:\n"
    page += "".join(f"- `--lr_scheduler {word}`: {advice}.\n" for word, advice in NOT_OFFERED.items())
    page += (
        "- `--lr_scheduler constant_with_warmup`: `--scheduler constant`; `--mixed_precision no`: `--precision fp32`.\n"
    )
    page += "\n## What `--compat` sets\n\nFlags on the line win over these.\n"
    lines = {"hf-sd15": {}, "hf-sdxl": {}, "sf": {}, "sf --sdxl": {"family": "sdxl"}}
    for line, changes in lines.items():
        peer = line.split()[0]
        settings = ", ".join(f"{name} {_shown(value)}" for name, value in defaults(peer, changes).items())
        page += f"\n`--compat {line}`: {settings}.\nDifferent all the same: {_DIFFERENCES[peer]}.\n"
    return page


def _meaning(name: str, flag: Foreign) -> str:
    special = {
        "beta_dpo": "`--beta`; doubled under `--compat hf-sd15`, whose script leaves the 1/2 out of the loss",
        "use_adafactor": "`--optimizer adafactor`; under `--compat sf` also `--max-grad-norm 0`, as there",
        "report_to": "`--tensorboard`, `--wandb`, both (`all`) or neither (`none`)",
        "run_validation": "`--sample-every` at the interval of `--validation_steps`",
    }
    if name in special:
        return special[name]
    if flag.refuse:
        return f"refused: {flag.refuse}"
    if flag.note:
        return f"accepted without effect: {flag.note}"
    if flag.sets == {"flip": False}:
        return "`--no-flip`"
    return ", ".join(f"`{specs()[key].flag} {_shown(value)}`" for key, value in flag.sets.items())


def _shown(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else brief(value)


if __name__ == "__main__":
    sys.stdout.write(flags_page())

"""What of a preset, or of another script's defaults, still holds beside the settings that the user gave himself.

Some settings of a recipe belong to others: beta to the method, the held-out pairs to the data. Where the user replaces
the one, the recipe's other goes with it. A user's own TOML file is no recipe: what it says is the user's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.methods import METHODS, own_settings
from dpo.settings.config import specs
from dpo.settings.fields import brief, coerce

HELD_OUT = ("validation_data", "validation_split", "validation_fraction")


def beside(recipe: Mapping[str, Any], said: Mapping[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    """The settings of `recipe` that hold beside those that the user `said`, both flat; the others are told in `notes`.

    name: of the recipe, for the log.
    """
    return _held_out(_method(dict(recipe), said, name, notes), said, name, notes)


def over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of both, the upper ones where both have them. Each may say in its own way how large an update is, or how
    long the run.

    The lower's effective batch does not hold beside an upper accumulation, nor its accumulation beside an effective
    batch; nor do its steps beside upper epochs, nor its epochs beside upper steps.
    """
    kept = dict(lower)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if coerce(specs()[one], upper.get(one)) is not None:
            kept.pop(other, None)
    if "effective_batch" in upper:
        kept.pop("accumulation", None)
    elif "accumulation" in upper:
        kept.pop("effective_batch", None)
    return kept | dict(upper)


def _method(kept: dict[str, Any], said: Mapping[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    """Without the settings that belong to the recipe's method, where the user chose another."""
    own, asked = kept.get("method", specs()["method"].default), said.get("method")
    bound = [setting for setting in own_settings() if setting in kept]
    if asked in (None, own) or asked not in METHODS or not bound:
        return kept
    for setting in sorted(bound):
        value = kept.pop(setting)
        if setting in METHODS[asked].settings and setting not in said:
            notes.append(f"{name}: {setting} {brief(value)} belongs to {own}; {asked} takes its own default")
    return kept


def _held_out(kept: dict[str, Any], said: Mapping[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    """Without the recipe's held-out pairs, where the user named other pairs to train on or to hold out."""
    theirs = kept.get("validation_data")
    own_data = said.get("data") not in (None, kept.get("data"))
    other = said.get("validation_data") not in (None, theirs)
    if theirs is None or not (own_data or other or shares(said)):
        return kept
    if other or "validation_data" not in said:
        kept = {setting: value for setting, value in kept.items() if setting not in HELD_OUT}
    if "validation_data" not in said:
        why = "--validation-fraction is given" if shares(said) else "--data is your own"
        instead = (
            ""
            if none_asked(said)
            else "; of --data some are held out where it has enough pairs, or name --validation-data"
        )
        notes.append(f"{why}: the held-out pairs of {name} ({theirs}) are left out{instead}")
    return kept


def flags_beat(file: Mapping[str, Any], flags: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The settings of a user's own file that hold beside his flags: of two ways to name held-out pairs the flag's."""
    kept = dict(file)
    if shares(flags) and "validation_data" not in flags:
        kept.pop("validation_data", None)
    if flags.get("validation_data") is not None and "validation_fraction" not in flags:
        kept.pop("validation_fraction", None)
    theirs = kept.get("validation_data")
    if theirs and "validation_data" not in flags and flags.get("data") not in (None, kept.get("data")):
        notes.append(
            f"held-out pairs are those that the file names ({theirs}), though --data is another; "
            "--validation-fraction 0.1 holds out some of --data instead"
        )
    return kept


def none_asked(said: Mapping[str, Any]) -> bool:
    """Whether the user said that no share of the training pairs is to be held out."""
    return said.get("validation_fraction") is not None and not shares(said)


def shares(said: Mapping[str, Any]) -> bool:
    """Whether a share of the training pairs above 0 was asked for. Raises UserError for a value that is none."""
    return bool(coerce(specs()["validation_fraction"], said.get("validation_fraction", 0.0)))

"""What kind of value stands where in a run's files: checked once, when a run is read, so that no page has to.

Files that a run wrote pass. One that was changed by hand is refused in one line that names the file and the value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo.common.errors import UserError
from dpo.pages.figures import DECILES, FIGURES
from dpo.settings.config import specs
from dpo.settings.fields import coerce

LONGEST = 40  # characters of a value in a message


class Kind(NamedTuple):
    """A kind of value: its name in a message, and whether a value is of it. None may stand for any."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: Any, length: int | None = None) -> bool:
    right = isinstance(value, list) and (length is None or len(value) == length)
    return right and all(item is None or _is_number(item) for item in value)


NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of lines", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
TABLE = Kind("names and values", lambda value: isinstance(value, dict))
BOUNDS = Kind("two numbers", lambda value: _is_list(value, 2) and None not in value)
BY_DECILE = Kind(f"a list of {DECILES} numbers", lambda value: _is_list(value, DECILES))
NUMBERS = Kind("a number or a list of numbers", lambda value: _is_number(value) or _is_list(value))

VALIDATION = {
    "heldout_accuracy": NUMBER,
    "heldout_interval": BOUNDS,
    "heldout_difference": NUMBER,
    "heldout_pairs": COUNT,
    "choosing_accuracy": NUMBER,
    "choosing_pairs": COUNT,
}
STARTED = {"start_loss": NUMBER, "start_pull": NUMBER}
SUMMARY = {
    "status": TEXT,
    "reason": TEXT,
    "steps": COUNT,
    "done": COUNT,
    "taken": COUNT,
    "seconds": NUMBER,
    "started": TEXT,
    "device": TEXT,
    "processes": COUNT,
    "versions": TABLE,
    "made_from": TABLE,
    "model": TABLE,
    "absent": TABLE,
    "data": TABLE,
    "evaluation": TABLE,
    "kept": TABLE,
    "result": TABLE,
    "notes": TEXTS,
    "warnings": TEXTS,
}
EVALUATION = {
    "win_rate": NUMBER,
    "win_rate_interval": BOUNDS,
    "prompts": COUNT,
    "faithfulness_before": NUMBER,
    "faithfulness_after": NUMBER,
}


def check_record(record: dict[str, Any], place: str) -> None:
    """Raises UserError, beginning with `place`, for a value of a metrics.jsonl line that is not of its kind."""
    if "event" in record:
        _check(record, {"event": TEXT, "step": COUNT, **VALIDATION, **STARTED}, place)
        return
    kinds = {
        name: BY_DECILE if name.endswith("_by_decile") else NUMBER if name in FIGURES else NUMBERS for name in record
    }
    _check(record, kinds | {"step": COUNT}, place)


def check_summary(summary: dict[str, Any], place: str) -> None:
    """Raises UserError, beginning with `place`, for a value of summary.json that is not of its kind."""
    _check(summary, SUMMARY, place)
    _check(summary.get("evaluation") or {}, EVALUATION, place)
    _check(summary.get("data") or {}, {"usable": COUNT}, place)


def check_tables(tables: dict[str, Any], place: str) -> None:
    """Raises UserError, beginning with `place`, for a table that is no list of numbers."""
    _check(tables, dict.fromkeys(tables, Kind("a list of numbers", _is_list)), place)
    lengths = {name: len(values) for name, values in tables.items() if values is not None}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f'"{name}" {length}' for name, length in lengths.items())
        raise UserError(f"{place}: its tables are of different lengths ({told[:LONGEST]}); put them back, or delete it")


def check_settings(settings: dict[str, dict[str, Any]], place: str) -> None:
    """Raises UserError, beginning with `place`, for a value that its setting does not take; other names may stand there."""
    known = specs()
    for group in settings.values():
        for name, value in group.items():
            if name in known and not known[name].meta["choices"]:  # a later version may have more choices
                try:
                    coerce(known[name], value)
                except UserError as error:
                    raise UserError(f"{place}: {error}; put the run's own value back") from None


def _check(values: dict[str, Any], kinds: Mapping[str, Kind], place: str) -> None:
    for name, kind in kinds.items():
        value = values.get(name)
        if value is not None and not kind.holds(value):
            shown = json.dumps(value)
            shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
            raise UserError(f'{place}: "{name}" is {shown}, not {kind.words}; put the right value back, or delete it')

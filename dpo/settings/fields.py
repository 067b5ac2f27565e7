"""How a setting is declared, and how a value from a flag, a TOML file or Python becomes a checked one."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, NamedTuple

from dpo.common.errors import UserError
from dpo.common.words import is_plain

LONGEST = 200  # characters of a value in a message
ALIKE = 0.72  # of two names, by difflib's ratio: less is a guess that leads astray (snr-gamma is not gamma)
NOTHING = ("none", "")  # values of a flag that unset a setting that may be None


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    aliases: tuple[str, ...] = (),
    resume: str = "refused",
    separator: str = ",",
) -> Any:
    """A dataclass field: its one-line doc, unit, allowed values, other trainers' names for it, and its rule on resume.

    `low` and `high` are allowed bounds, `above` is an excluded lower one. `resume` rules a change on resume: "free" (no
    log line), "said" (allowed, with a log line) or "refused" (the result would belong to neither setting). `separator`
    splits one flag value of a tuple.
    """
    keys = {"help": help, "unit": unit, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata={**keys, "aliases": aliases, "resume": resume, "separator": separator})


class Spec(NamedTuple):
    """One setting as the command line and the TOML writer see it."""

    name: str
    group: str
    kind: type  # bool, int, float or str; the items' type when `many`
    many: bool
    optional: bool
    default: Any
    meta: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return "--" + self.name.replace("_", "-")


def specs_of(group: str, cls: type) -> list[Spec]:
    """The settings declared by one dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return [_spec(group, item, hints[item.name]) for item in fields(cls)]


def _spec(group: str, item: Field, hint: Any) -> Spec:
    assert item.default is not MISSING
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in parts
    kind = next(part for part in parts if part is not type(None))
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    return Spec(item.name, group, kind, many, optional, item.default, item.metadata)


def coerce(spec: Spec, value: Any) -> Any:
    """`value` (text of a flag, or a TOML or Python value) as this setting's checked value.

    Raises UserError that says what is allowed.
    """
    if spec.optional and (value is None or (isinstance(value, str) and value.lower() in NOTHING)):
        return None
    if spec.many:
        return _coerce_many(spec, value)
    converted = _CONVERT[spec.kind](value)
    if converted is None:
        raise UserError(f"{spec.name} = {_shown(value)}: {allowed(spec)}")
    if isinstance(converted, str) and not is_plain(converted):
        raise UserError(
            f"{spec.name} = {_shown(value)} has a character that no file or text has: it is not UTF-8, or NUL"
        )
    _check(spec, converted)
    return converted


def allowed(spec: Spec) -> str:
    """What this setting accepts, in words."""
    if spec.meta["choices"]:
        return "one of " + ", ".join(spec.meta["choices"])
    words = _WORDS[spec.kind] + (f" ({spec.meta['unit']})" if spec.meta["unit"] else "")
    phrases = (("low", "at least"), ("above", "above"), ("high", "at most"))
    bounds = [f"{phrase} {brief(spec.meta[key])}" for key, phrase in phrases if spec.meta[key] is not None]
    return " ".join(filter(None, ["expected", words, " and ".join(bounds), "or none" if spec.optional else ""]))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name in `names` most like `name`, None when none is like it: first one of which it is the first words.

    What names begin with in common, such as --, makes them no more alike.
    """
    known = {one.lstrip("-"): one for one in names}
    name = name.lstrip("-")
    longer = [one for one in known if one.startswith((f"{name}-", f"{name}_"))]
    found = longer[:1] if len(longer) == 1 else difflib.get_close_matches(name, longer or known, n=1, cutoff=ALIKE)
    return known[found[0]] if found else None


def _coerce_many(spec: Spec, value: Any) -> tuple:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise UserError(f"{spec.name} = {_shown(value)}: expected a list")
    if spec.meta["separator"]:
        items = [
            part for item in items for part in (item.split(spec.meta["separator"]) if isinstance(item, str) else [item])
        ]
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if len(items) == 1 and items[0] in NOTHING:
        return ()
    single = spec._replace(many=False)
    return tuple(coerce(single, item) for item in items)


def _check(spec: Spec, value: Any) -> None:
    low, high, above, choices = (spec.meta[key] for key in ("low", "high", "above", "choices"))
    outside = (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    )
    if outside or (choices and value not in choices):
        like = nearest(value, choices) if choices else None
        raise UserError(
            f"{spec.name} = {_shown(value)}: {allowed(spec)}" + (f" (did you mean {like}?)" if like else "")
        )


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, (int, float, str)) and value != "" else repr(value)
    text = ascii(text)[1:-1] if len(text.splitlines()) > 1 else text
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} in all)"


def brief(value: Any) -> str:
    """A setting's value inside a message: a float in at most six digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _to_bool(value: Any) -> bool | None:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass  # not yet a mistake: 1e3 is a whole number too
    number = _to_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _to_str(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


_CONVERT: dict[type, Any] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

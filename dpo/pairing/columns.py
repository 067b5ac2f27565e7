"""Which column of a table holds what, and which end of a number is the better one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dpo.common.errors import UserError
from dpo.common.words import command_line, excerpt, listed
from dpo.data.labels import CAPTION, IMAGE, NUMBERS, plain
from dpo.settings.fields import nearest

USUAL: dict[str, tuple[str, ...]] = {
    "image": IMAGE,
    "number": tuple(NUMBERS),
    "prompt": (*CAPTION, "description"),
    "group": ("group", "group_id", "prompt_id"),
    "winner": ("winner", "win", "preferred"),
    "loser": ("loser", "lose", "dispreferred"),
    "tie": ("tie", "draw", "tied"),
}
FLAGS = {
    "image": "image",
    "number": "value",
    "prompt": "caption",
    "group": "group",
    "winner": "chosen",
    "loser": "rejected",
}
PAIRS = ({"chosen", "rejected"}, {"jpg_0", "jpg_1"}, {"image_0", "image_1"})  # columns of what is pairs already


@dataclass(frozen=True)
class Named:
    """Columns that the user names, by what they hold; None: found by their usual names."""

    image: str | None = None
    number: str | None = None
    prompt: str | None = None
    group: str | None = None
    winner: str | None = None
    loser: str | None = None


@dataclass(frozen=True)
class Columns:
    """Columns of a table as it spells them; either image and number, or winner and loser, are there."""

    image: str | None
    number: str | None
    winner: str | None
    loser: str | None
    tie: str | None
    prompt: str | None
    group: str | None

    @property
    def of_matches(self) -> bool:
        """Whether the rows are matches."""
        return self.number is None

    def said(self) -> str:
        """What was found, for the log."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name} from {excerpt(value)}" for name, value in found.items())


def find(names: Iterable[str], named: Named, where: str) -> Columns:
    """The columns of a table with these `names`. Raises UserError, which names those that are almost right."""
    names = list(names)
    spelled: dict[str, str] = {}
    for name in names:
        if plain(name) in spelled:
            raise UserError(f"{where}: two columns are called {excerpt(plain(name))}: rename one")
        spelled[plain(name)] = name
    found = {what: _pick(what, spelled, named, where) for what in USUAL}
    ranked = found["image"] is not None and found["number"] is not None
    matched = found["winner"] is not None and found["loser"] is not None
    if ranked == matched:
        raise _wrong(where, names, spelled, found, both=ranked)
    wrong = ("winner", "loser", "tie") if ranked else ("image", "number")
    if useless := [what for what in wrong if getattr(named, what, None) is not None]:
        kind = "images with a number, no matches" if ranked else "matches, no images with a number"
        raise UserError(f"{where}: holds {kind}: leave --{FLAGS[useless[0]]}-column out")
    return Columns(**{what: None if what in wrong else name for what, name in found.items()})


def _pick(what: str, spelled: Mapping[str, str], named: Named, where: str) -> str | None:
    asked: str | None = getattr(named, what, None)
    if asked is not None:
        if plain(asked) not in spelled:
            raise UserError(f"{where}: --{FLAGS[what]}-column {asked}: there is {listed(spelled.values())}")
        return spelled[plain(asked)]
    found = [spelled[name] for name in USUAL[what] if name in spelled]
    if what == "number" and len(found) > 1:
        raise UserError(f"{where}: has {listed(found)}: say with --value-column by which the images are compared")
    return found[0] if found else None


def _wrong(
    where: str, names: list[str], spelled: Mapping[str, str], found: Mapping[str, str | None], *, both: bool
) -> UserError:
    if both:
        return UserError(f"{where}: has images with a number and matches too: leave the columns of one of them out")
    if any(pair <= spelled.keys() for pair in PAIRS):
        return UserError(
            f"{where}: holds pairs already: train with --data {where}; {command_line(['dpo.pairs', '--check', where])} looks at "
            "them"
        )
    wanted = ("winner", "loser") if found["winner"] or found["loser"] else ("image", "number")
    what = next(one for one in wanted if found[one] is None)
    left = [name for name in spelled if spelled[name] not in found.values()]
    like = next((spelled[name] for name in left if nearest(name, USUAL[what]) is not None), None)
    usual = "a number (rank, score, stars or another)" if what == "number" else f"the {what} ({listed(USUAL[what])})"
    hint = f"{excerpt(like)} looks like it: rename it, or " if like is not None else ""
    return UserError(
        f"{where}: no column of {usual}, found {listed(names) or 'none'}: {hint}name it with --{FLAGS[what]}-column"
    )


def higher_is_better(name: str, asked: bool | None, low: float, high: float) -> bool:
    """Whether a higher number of this column is better; asked: what the user said of it.

    Raises UserError for a name that people use both ways: swapped labels teach the opposite of what was meant.
    """
    known = NUMBERS.get(plain(name))
    if asked is None and known is None:
        raise UserError(
            f"column {excerpt(name)} runs from {low:g} to {high:g}, and its name does not say which end is better: give "
            f"--lower-is-better ({low:g} is best) or --higher-is-better ({high:g} is best)"
        )
    return bool(known) if asked is None else asked

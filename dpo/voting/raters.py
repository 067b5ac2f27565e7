"""Who may vote: names, which stay on this machine, and the keys in links."""

from __future__ import annotations

import hmac
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dpo.common.errors import UserError, reading
from dpo.common.files import AGAIN, write_text
from dpo.common.words import UNPRINTABLE, excerpt, is_plain
from dpo.voting import answers

FILE = "raters.json"  # names that have links of their own
LONGEST = 60  # characters of a name


def cleaned(name: str) -> str | None:
    """A name as it is kept, spelt one way, without spaces around it and letters that nobody sees; None for what is no name."""
    if not is_plain(name) or UNPRINTABLE.search(name):
        return None
    seen = "".join(letter for letter in unicodedata.normalize("NFC", name) if unicodedata.category(letter) != "Cf")
    plain = " ".join(seen.split())
    return plain if 0 < len(plain) <= LONGEST else None


def invited(folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The raters with links of their own, with those that are added now. Raises UserError.

    Who has voted is added as the votes spell the name: under another spelling the same person would count twice.
    """
    path, names = folder / FILE, list[str]()
    if path.exists():
        with reading(str(path), "mend it, or delete it and give --raters again"):
            names = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("it is no list of names")
    known = {name.casefold() for name in names}
    spelt = {answer.rater.casefold(): answer.rater for answer in answers.read(folder)} if more else {}
    for name in more:
        if (clean := cleaned(name)) is None:
            raise UserError(f"--raters {excerpt(name)}: a name has 1 to {LONGEST} characters that can be printed")
        if clean.casefold() not in known:
            known.add(clean.casefold())
            names = [*names, spelt.get(clean.casefold(), clean)]
    if more:
        write_text(path, json.dumps(names, indent=1), AGAIN)
    return names


def key_of(secret: bytes, name: str) -> str:
    """What proves that somebody is this rater; it stands in the rater's own link."""
    return _keyed(secret, "rater", name)


def key_of_all(secret: bytes) -> str:
    """What stands in the link that is the same for everybody."""
    return _keyed(secret, "everybody", "")


def _keyed(secret: bytes, what: str, name: str) -> str:
    return hmac.digest(secret, f"{what}\0{name}".encode(), "sha256").hex()[:32]

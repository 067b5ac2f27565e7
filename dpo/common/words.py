"""Words for messages."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterable

SHOWN = 80  # characters of a cell, caption or key in a message
LISTED = 20  # names in a message
# Controls of the sets C0 and C1, marks of direction (which can hide what a line says), halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def command_line(words: Iterable[str]) -> str:
    """A command of the package, "dpo.train" and its flags, as one types it: quoted where a shell wants that."""
    return shlex.join(["python", "-m", *words])


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most some 300 characters; the name of the error's class where it has no text."""
    text = str(error).strip()
    return shortened((text.splitlines() or [type(error).__name__])[0], 300)


def shortened(text: str, most: int) -> str:
    """`text`, or its first words of at most so many characters and " ..."; one word that is longer is cut."""
    if len(text) <= most:
        return text
    return (text[: most + 1].rpartition(" ")[0].rstrip() or text[:most]) + " ..."


def printable(text: str) -> str:
    """`text` as a terminal may get it: characters that move its cursor, colour it or turn its direction are escaped.

    Names of files and columns, captions and errors of libraries repeat what a data set says. Line breaks and tabs stay.
    """
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def well_formed(text: str) -> str:
    """`text` as it can be written as UTF-8: halves of surrogate pairs, which JSON lets pass, are question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: no half of a surrogate pair is in it."""
    return well_formed(text) == text


def is_plain(text: str) -> bool:
    """Whether `text` can be a name or a text in any file: it is Unicode without NUL."""
    return "\0" not in text and is_unicode(text)


def excerpt(value: object, limit: int = SHOWN) -> str:
    """A value from a file as a message shows it: quoted, on one line, and at most `limit` characters of it.

    A cell may hold a whole image as text; no message repeats it.
    """
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}... ({len(value)} in all)"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:limit]


def brief(value: object, limit: int = 3 * SHOWN) -> str:
    """A value of a config as a message shows it: as it is written, on one line, and cut after `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def excerpt_of_path(path: str) -> str:
    """A path as a message shows it: whole where it can be one, else its last characters (a cell need hold no path).

    Half characters, which no log file takes, are written out.
    """
    path = path.encode("utf-8", "backslashreplace").decode()
    return path if len(path) <= 3 * SHOWN else "..." + path[-SHOWN:]


def counted(count: int, one: str, many: str, style: str = "") -> str:
    """A number and what it counts: "1 image is", "2 images are"; style: how the number is written, "," with commas."""
    return f"{count:{style}} {one if count == 1 else many}"


def number_of(count: int, many: str, style: str = "") -> str:
    """The same of what has a usual plural: "1 pair", "2 pairs"; many: "pairs"."""
    return counted(count, many.removesuffix("s"), many, style)


def counted_of(count: int, total: int, many: str, is_one: str, are_many: str) -> str:
    """Some of a number and what they do: "1 of 5 images is", "2 of 5 images are", "1 of 1 image is"; many: "images"."""
    return f"{count} of {number_of(total, many)} {is_one if count == 1 else are_many}"


def multiples(of: int, near: int) -> str:
    """What a number may be that is a multiple of another, with those next to `near`: "multiples of 16: 64 or 80"."""
    below = near // of * of
    return f"multiples of {of}: {below} or {below + of}" if below else f"multiples of {of}: {of}"


def as_on_windows(path: str) -> str:
    """The end of a message on a path that is not there: a hint where it has backslashes, and this system cuts by slashes."""
    return "; it is written with \\, as on Windows: write / here" if "\\" in path and os.sep == "/" else ""


def listed(names: Iterable[str]) -> str:
    """Names with commas between, each cut after SHOWN characters, and the first LISTED of them."""
    names = [str(name) for name in names]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(name if len(name) <= SHOWN else name[:SHOWN] + "..." for name in names[:LISTED]) + more


def digest(*parts: str) -> str:
    """A stable 128-bit hash of some strings, hexadecimal."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

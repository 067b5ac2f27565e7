"""Words for messages."""

from __future__ import annotations

import hashlib


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters; the name of the error's class where it has no text."""
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]


def digest(*parts: str) -> str:
    """A stable 128-bit hash of some strings, hexadecimal."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

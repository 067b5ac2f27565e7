"""Words for messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters of it; the name of its kind where it has no text."""
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]

"""Words for messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a one-line message."""
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]

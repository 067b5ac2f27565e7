"""Tables and lines of Markdown from texts that may say anything."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dpo.common.words import printable

SPECIAL = re.compile(r"[&<>|\\`*\[\]]")  # what Markdown reads as more than a character


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without lines."""
    whole = [head, ["---"] * len(head), *lines] if lines else []
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in whole)


def cell(text: str) -> str:
    """A text on one line of Markdown that makes no cell, no tag and no link of it, and that a terminal may show."""
    return SPECIAL.sub(lambda found: f"&#{ord(found[0])};", " ".join(printable(text).split()))

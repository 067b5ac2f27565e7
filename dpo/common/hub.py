"""Names on the Hugging Face hub."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name looks like `owner/name`. A path such as `./folder` does not."""
    return HUB_ID.fullmatch(name) is not None

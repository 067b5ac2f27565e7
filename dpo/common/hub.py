"""Names on the Hugging Face hub."""

from __future__ import annotations

import re

from dpo.common.words import first_line

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name looks like `owner/name`. A path such as `./folder` does not."""
    return HUB_ID.fullmatch(name) is not None


OFF = (
    "local_files_only",
    "offline mode",
    "outgoing traffic",
    "HF_HUB_OFFLINE",
)  # what the client says where it may not ask
LONGEST = 160  # characters of a reason


def reason(error: BaseException) -> str:
    """Why something cannot be had from the hub, in a few words: the client's own messages advise on its own arguments."""
    if any(word in str(error) for word in OFF):
        return "it is not in the cache of the hub, and the hub is not asked: HF_HUB_OFFLINE"
    said = first_line(error)
    return said if len(said) <= LONGEST else said[:LONGEST].rpartition(" ")[0] + " ..."

"""Names on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from dpo.common.words import first_line, shortened

LONGEST = 160  # characters of a reason

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name looks like `owner/name`. A path such as `./folder` does not."""
    return HUB_ID.fullmatch(name) is not None


NOT_ASKED = "it is not in the cache of the hub, and the hub is not asked: HF_HUB_OFFLINE"
OFF = ("local_files_only", "offline mode", "outgoing traffic", "HF_HUB_OFFLINE")  # what the client says then
UNREACHED = "the hub cannot be reached, and it is not in the hub's cache"
NO_FILE = "the hub has no such file of it"
# What errors of the client and of its network library mean, by the names of their classes. The order matters: a gated
# repository counts as one that is not found, and a file that is not in the cache as one that is not there.
KINDS = {
    "OfflineModeIsEnabled": NOT_ASKED,
    "GatedRepoError": "it is gated: accept its terms on its page of the hub, then log in with hf auth login",
    "RepositoryNotFoundError": "the hub has nothing of that name, or it is private: log in with hf auth login",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "RemoteEntryNotFoundError": NO_FILE,
    "ConnectionError": UNREACHED,
    "ConnectError": UNREACHED,
    "TimeoutException": UNREACHED,
}
KINDS_IN_DOUBT = {"LocalEntryNotFoundError": UNREACHED, "EntryNotFoundError": NO_FILE}  # where the text says no more


def reason(error: BaseException) -> str:
    """Why something cannot be had from the hub, in a few words: the client's own messages advise on its own arguments.

    Not found, gated, not reached and not asked are told apart, also where a library made an error of its own of it.
    """
    chain = list(_causes(error))
    if said := _meant(chain, KINDS):
        return said
    if any(word in str(one) for one in chain for word in OFF):
        return NOT_ASKED
    return _meant(chain, KINDS_IN_DOUBT) or shortened(first_line(error), LONGEST)


def _meant(chain: Sequence[BaseException], kinds: Mapping[str, str]) -> str | None:
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    return next((said for name, said in kinds.items() if name in names), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or that were being handled."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or one.__context__

"""Which records of a run are of the weights that are its result: those of the update that --keep-best kept, else the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo.pages.folder import RunFolder
from dpo.pages.single import held_things

SAID = ("step", "of", "early", "heldout_accuracy", "choosing_accuracy", "choosing_pairs")


def kept(run: RunFolder) -> dict[str, Any]:
    """What the summary says of the choice; empty where the last weights are the result."""
    found = run.summary.get("kept") or {}
    return found if all(name in found for name in SAID) else {}


def kept_update(run: RunFolder) -> int | None:
    """The update whose weights are the result; None where they are the last ones."""
    return kept(run).get("step")


def validation(run: RunFolder) -> dict[str, Any] | None:
    """The held-out accuracy of the result; None where there is none.

    That of a choice is in the summary: a run that goes on in another folder has records from its own start on alone.
    """
    found = [event for event in run.validations if isinstance(event.get("heldout_accuracy"), (int, float))]
    return kept(run) or (found[-1] if found else None)


def grids(run: RunFolder) -> list[Path]:
    """The grids of sample images, that of the result last."""
    own = f"step-{kept_update(run) or 0:08d}"
    return sorted(run.grids, key=lambda path: path.stem == own)


def sentences(run: RunFolder) -> list[str]:
    """What a person should know of the choice; empty where there was none."""
    found = kept(run)
    if not found:
        return []
    ended = " The run ended early: held-out accuracy had not risen for long (--patience)." if found["early"] else ""
    return [
        f"The result is the weights of update {found['step']:,} of {found['of']:,}: the best by one half of the held-out {held_things(run)}, "
        f"{found['choosing_accuracy']:.0%} of {found['choosing_pairs']:,}. The accuracy that is reported is that of the other half, "
        f"which had no say.{ended}"
    ]

"""What came of a run, in a few values, read from its folder: what `dpo.align` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo.pages.folder import REPORT_FILE, read_run
from dpo.pages.verdict import Evidence, held_out, verdict, win_rate


@dataclass(frozen=True)
class Aligned:
    """A run that ended. `read_run(output)` has every figure of every update."""

    output: Path  # the aligned model or LoRA, as diffusers loads it, and all else that the run left
    report: Path  # a page for a browser
    verdict: str  # the first sentence of that page
    updates: int
    held_out: Evidence | None  # share of the held-out pairs that the policy ranks as people did, with its interval
    win_rate: Evidence | None  # over the start, by a scorer; None where the run was not asked to measure it


def read_aligned(output: Path | str) -> Aligned:
    """What came of the run in the folder `output`. Raises UserError where there is none."""
    run = read_run(output)
    return Aligned(
        output=run.folder,
        report=run.folder / REPORT_FILE,
        verdict=verdict(run).headline,
        updates=run.done,
        held_out=held_out(run),
        win_rate=win_rate(run),
    )

"""Where a run stands beside the result in its folder: they part where a run that had ended goes on, or back, and has not ended again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.pages.folder import (
    ADAPTER_FILE,
    CHECKPOINTS,
    INDEX_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    read_json,
    read_records,
    read_settings,
)

RESULT = "result"  # of SUMMARY_FILE: "step", the update whose weights the result has, and "of", the last that was made for it


def result_of(summary: Mapping[str, Any]) -> dict[str, int]:
    """What a summary says of the result under RESULT, those of earlier versions of a finished run alone; empty where it says nothing."""
    kept, last = summary.get("kept"), summary.get("steps")
    chosen = kept.get("step", last) if isinstance(kept, dict) else last
    said = summary.get(RESULT) or ({"step": chosen, "of": last} if summary.get("status") == "finished" else {})
    known = isinstance(said, dict) and all(isinstance(said.get(name), int) for name in ("step", "of"))
    return said if known else {}


def apart(folder: Path) -> str | None:
    """A line on a folder whose result is of another update than the one at which its run stands; None where it is of that one.

    Where a run was killed its summary is that of the start before, so the update is the newest of metrics and checkpoints.
    """
    summary, records = read_json(folder / SUMMARY_FILE), read_records(folder / METRICS_FILE)
    steps = [record["step"] for record in records if "event" not in record and isinstance(record.get("step"), int)]
    steps += [int(path.name.removeprefix("step-")) for path in (folder / CHECKPOINTS).glob(f"step-{'[0-9]' * 8}")]
    if not steps:
        return None
    made, result, last = max(steps), result_of(summary), summary.get("steps")
    wanted = next((one["total"] for one in reversed(records) if isinstance(one.get("total"), int)), made)
    if made == result["of"] if result else made >= (last if isinstance(last, int) else wanted):
        return None
    how = f", {summary['status']}" if summary.get("status") in ("interrupted", "failed") else ""
    which = f"that of update {result['step']}" if result else "an earlier one"
    return (
        f"{folder} stands at update {made} of {wanted}{how}; its result is {which}: finish the run with --resume latest"
    )


def left_by_run(name: str) -> str | None:
    """What `apart` says of the run whose folder `name` is, or in whose folder it lies: unet, or the file of an adapter."""
    path = Path(name).expanduser()
    runs = [folder for folder in (path, path.parent) if path.exists() and read_settings(folder)]
    return apart(runs[0]) if runs and any((runs[0] / file).is_file() for file in (INDEX_FILE, ADAPTER_FILE)) else None

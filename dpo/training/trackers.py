"""Where figures go: metrics.jsonl always, TensorBoard and W&B when asked.

metrics.jsonl holds one JSON object per line: `{"step": 3, "loss": ...}` for an update, `{"event": "validation", "step":
3, ...}` for anything else. Values that are not finite are written as null, so that every line is valid JSON.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from dpo.common import libraries
from dpo.common.errors import UserError
from dpo.common.files import write_text
from dpo.common.words import first_line
from dpo.drawing.grid import read_picture
from dpo.pages.folder import METRICS_FILE, TENSORBOARD, WANDB_ID_FILE, read_records

PICTURE = "samples"  # the name of the grid of sample images at the trackers

log = logging.getLogger("dpo")


class Sink(NamedTuple):
    """One further destination: `scalars(step, flat)`, `picture(step, image)` and `close()`."""

    scalars: Callable[[int, dict[str, float]], None]
    picture: Callable[[int, Image.Image], None]
    close: Callable[[], None]


class Trackers:
    """The open destinations of a run; made by `open_trackers`."""

    def __init__(self, lines: TextIO, sinks: list[Sink], logged: int = 0) -> None:
        self._lines = lines
        self._sinks = sinks
        self.logged = logged  # the last update whose figures are in metrics.jsonl

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the figures of update number `step`."""
        self._write({"step": step, **metrics})
        self.logged = step
        self._scalars(step, flat_numbers(metrics))

    def event(self, event: Mapping[str, Any]) -> None:
        """Writes anything else that happened. It needs "event", and "step" if the trackers should plot its numbers."""
        self._write(event)
        if "step" in event:
            numbers = flat_numbers({key: value for key, value in event.items() if key not in ("event", "step")})
            self._scalars(event["step"], {f"{event['event']}/{key}": value for key, value in numbers.items()})

    def picture(self, step: int, path: Path | None) -> None:
        """Shows the grid of sample images in the file `path` with update `step`; nothing where there is none."""
        if not self._sinks or path is None or (image := read_picture(path)) is None:
            return
        for sink in self._sinks:
            sink.picture(step, image)

    def close(self) -> None:
        """Flushes and closes every destination."""
        self._lines.close()
        for sink in self._sinks:
            sink.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._lines.flush()

    def _scalars(self, step: int, numbers: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.scalars(step, numbers)


def open_trackers(
    output_folder: Path | str,
    tensorboard: bool = False,
    wandb: bool = False,
    project: str = "dpo",
    run_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
) -> Trackers:
    """Opens the destinations of a run. Raises UserError for one that was asked for and is not to be had.

    resume_step: None begins metrics.jsonl anew; k keeps its lines up to step k and drops those of updates that are made
    again. Then W&B that cannot be reached costs one warning, not the run, which may have been started again by night.
    """
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS_FILE
    if resume_step is None:
        path.unlink(missing_ok=True)
    else:
        rewind(path, resume_step)
    lines = path.open(
        "a", encoding="utf-8", newline="\n"
    )  # first: it tells a run that was killed below from others' files
    sinks: list[Sink | None] = []
    if tensorboard:
        sinks.append(_open_tensorboard(folder, resume_step))
    if wandb:
        sinks.append(
            _open_wandb(folder, project, run_name or folder.resolve().name, dict(config or {}), resume_step is not None)
        )
    return Trackers(lines, [sink for sink in sinks if sink is not None], resume_step or 0)


def rewind(path: Path, step: int) -> None:
    """Drops the lines of a metrics file after `step`, and torn ones; the file is replaced in one step.

    A link gives way to a file: what is appended must not land where it points.
    """
    if not path.exists() and not path.is_symlink():
        return
    kept = [record for record in read_records(path) if record.get("step", 0) <= step]
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def flat_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers of a record by name; lists become `name/0`, `name/1`, ...; everything else is left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        items = enumerate(value) if isinstance(value, (list, tuple)) else ()
        for name, number in [(key, value), *((f"{key}/{index}", item) for index, item in items)]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number):
                flat[name] = float(number)
    return flat


def _finite(value: Any) -> Any:
    """A copy fit for JSON: numbers that are not finite become None, tuples lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def check(tensorboard: bool, wandb: bool) -> None:
    """Raises UserError for a tracker that is asked for and not installed: before hours of training, not after."""
    for name, asked in (("tensorboard", tensorboard), ("wandb", wandb)):
        if asked and not libraries.is_there(name):
            flags = f"--{name} (or --report_to {name})"
            raise UserError(f"{flags}: {name} is not installed: {libraries.TRACKING}; or leave the flag out")


def _open_tensorboard(folder: Path, resume_step: int | None) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"--tensorboard: cannot be imported ({first_line(error)}): {libraries.TRACKING}; or leave --tensorboard out"
        ) from error
    purge = None if resume_step is None else resume_step + 1
    writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)

    def scalars(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def picture(step: int, image: Image.Image) -> None:
        writer.add_image(PICTURE, np.asarray(image), step, dataformats="HWC")

    return Sink(scalars, picture, writer.close)


def _open_wandb(folder: Path, project: str, run_name: str, config: dict[str, Any], resumed: bool) -> Sink | None:
    """A W&B run; its id is kept in the run folder, so that a resumed run continues the same curve."""
    try:
        import wandb

        id_file = folder / WANDB_ID_FILE
        run_id = id_file.read_text("utf-8").strip() if resumed and id_file.exists() else uuid.uuid4().hex[:8]
        run = wandb.init(project=project, name=run_name, config=config, dir=str(folder), id=run_id, resume="allow")
        write_text(id_file, run_id + "\n")
    except Exception as error:  # the client raises its own kinds for a missing key, network or service
        why = f"{type(error).__name__}: {first_line(error)}"
        if not resumed:
            raise UserError(
                f"--wandb: W&B cannot be used ({why}): log in with wandb login, set WANDB_MODE=offline, or leave --wandb out"
            ) from error
        log.warning("W&B cannot be used (%s); the run goes on with %s.", why, METRICS_FILE)
        return None
    return Sink(
        lambda step, numbers: run.log(numbers, step=step),
        lambda step, image: run.log({PICTURE: wandb.Image(image)}, step=step),
        run.finish,
    )

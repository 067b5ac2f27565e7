"""One replay from what is asked to its files: replay.json, replay.html and the images of the pairs that weigh most."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpo.common.command import of_launcher
from dpo.common.console import Progress, duration
from dpo.common.errors import UserError
from dpo.common.words import number_of
from dpo.pages import replay as page
from dpo.pages.figures import progress_fields
from dpo.pages.folder import RunFolder
from dpo.replaying import again, history, pairs, pictures
from dpo.settings.config import Config, change, flatten, specs
from dpo.settings.rules import without_effect
from dpo.training import summary
from dpo.training.folder import check_own
from dpo.training.run import Diverged, Figures, Run

SHOWN = 24  # pairs whose images are written

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    run: Path
    update: int
    output: Path
    top: int | None = None  # pairs whose own gradient is measured; None: all
    around: int = 10
    without: tuple[int, ...] = ()  # keys of pairs
    changes: Mapping[str, Any] = field(default_factory=dict)  # settings of the updates that are made otherwise, by name
    places: Mapping[str, Any] = field(default_factory=dict)  # device, data, model: settings by name

    @property
    def otherwise(self) -> bool:
        """Whether updates are made a second time, with something changed."""
        return bool(self.without or self.changes)


def replay(asked: Asked, train_step: again.TrainStep) -> dict[str, Any]:
    """Replays the run up to its update and writes what is found; the content of replay.json.

    Raises UserError for what a person can mend, and Diverged where an update before the asked one is not finite.
    """
    if (processes := of_launcher("WORLD_SIZE", 1)) > 1:
        raise UserError(f"started as {processes} processes: a replay is made by one; leave out torchrun")
    folder = asked.run.resolve()
    run = history.read(asked.run, asked.update)
    _check_output(asked.output, folder)
    config = history.settings(run, asked.update)
    config = history.on_this_machine(config, run, {**asked.places, "output": str(asked.output)})
    otherwise = _otherwise(config, asked)
    try:
        result, images = _replayed(asked, run, config, otherwise, train_step)
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory: replay on a larger one, or with --device cpu") from error
    page.write(asked.output, result, images)
    return result


def _replayed(
    asked: Asked,
    folder: RunFolder,
    config: Config,
    otherwise: Config,
    train_step: again.TrainStep,
) -> tuple[dict[str, Any], list[Image.Image]]:
    """The content of replay.json, and the images of each pair whose images are shown."""
    first = max(1, asked.update - asked.around) if asked.otherwise else asked.update
    saved = history.state_before(folder, first)
    try:
        run = again.built(config, saved, held_out=asked.otherwise)
    except UserError as error:
        if not (moved := history.gone(config)):
            raise
        raise UserError(f"{error}; where it is elsewhere now, say where with {' and '.join(moved)}") from error
    before, total = run.done, run.total
    last = min(asked.update + asked.around, total) if asked.otherwise else asked.update
    _check_pairs(run, folder, asked.update)
    if asked.update > total:
        raise UserError(f"{asked.run} makes {total} updates: give --update a number from 1 to {total}")
    if unknown := sorted(set(asked.without) - (pairs.keys_between(run, first, last) if asked.without else set())):
        raise UserError(
            f"--without {unknown[0]}: no {run.things[:-1]} of updates {first} to {last} has this key; "
            f"python -m dpo.replay {asked.run} --update {asked.update} lists those of one update"
        )
    _tell(asked, folder, saved, before, last)
    curve = _Curve("as it was")
    with Progress(last, _shown(run), before) as progress:
        curve.make(run, first - 1, train_step, progress)
        state = again.kept(run) if asked.otherwise and not curve.ended else None
        curve.make(run, asked.update - 1, train_step, progress)
        if curve.ended:
            raise UserError(f"{curve.ended}, before update {asked.update}: ask for that one")
        found = pairs.measured(run, asked.top)
        images = _pictures(run, found[:SHOWN])
        curve.make(run, last, train_step, progress)
    curve.held_out = again.held_out(run) if asked.otherwise else None
    device, things = summary.device_name(run.device), run.things
    del run
    curves = [curve]
    if state is not None:
        _free()
        curves.append(_second(asked, otherwise, state, last, train_step))
    result = {
        "format": page.FORMAT,
        "run": str(asked.run),
        "update": asked.update,
        "from": {"step": before, "checkpoint": saved.path.name if saved else None, "updates": last - before},
        "device": device,
        "versions": summary.versions(),
        "of_run": {
            "device": folder.summary.get("device"),
            "versions": folder.summary.get("versions"),
            "processes": history.processes(folder, asked.update),
        },
        "compared": history.compared(folder, curve.figures),
        "figures": curve.figures.get(asked.update),
        "ended": curve.ended,
        "things": things,
        "share": pairs.SHARE.format(a="a" if things == "pairs" else "an", one=things[:-1]),
        "measured": sum(pair.gradient_norm is not None for pair in found),
        "pairs": [pair.row() for pair in found],
        "window": [first, last],
        "changes": _changes(config, otherwise, asked),
        "without": [str(key) for key in asked.without],
        "curves": [one.row(first) for one in curves],
    }
    return result, images


@dataclass
class _Curve:
    """Updates that were made, by number, and the held-out accuracy after the last of them."""

    name: str
    figures: dict[int, Figures] = field(default_factory=dict)
    held_out: Figures | None = None
    ended: str | None = None  # why it ends early

    def make(
        self,
        run: Run,
        until: int,
        train_step: again.TrainStep,
        progress: Progress,
        without: tuple[int, ...] = (),
    ) -> None:
        """Makes the run's updates up to `until`; one whose loss or gradient is not finite is the last."""
        if self.ended:
            return
        try:
            for figures in again.updates(run, until, train_step, without):
                self.figures[run.done] = figures
                progress.update(run.done, figures)
        except Diverged:
            self.ended = f"update {run.done + 1} gives a loss or gradient that is not finite"

    def row(self, first: int) -> dict[str, Any]:
        """As JSON, from update `first` on."""
        made = [{"step": step, **figures} for step, figures in self.figures.items() if step >= first]
        return {"name": self.name, "updates": made, "heldout": self.held_out, "ended": self.ended}


def _second(asked: Asked, config: Config, state: Any, last: int, train_step: again.TrainStep) -> _Curve:
    """The same updates once more from the kept state, with what is changed."""
    curve = _Curve("changed")
    run = again.built(config, state, held_out=True)
    with Progress(last, _shown(run), run.done) as progress:
        curve.make(run, last, train_step, progress, asked.without)
    curve.held_out = again.held_out(run)
    return curve


def _shown(run: Run) -> Callable[[Mapping[str, Any]], list[str]]:
    what = run.things
    return lambda figures: progress_fields(figures, what)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_output(output: Path, run: Path) -> None:
    """Raises UserError where the output would lie in the run, or holds what is no replay."""
    place = output.resolve()
    if place == run or place.is_relative_to(run):
        raise UserError(f"--output {output} lies in the run's own folder, which is only read: name another folder")
    if run.is_relative_to(place):
        raise UserError(f"--output {output} has the run's folder in it: name a folder of its own")
    check_own("--output", output)
    if output.is_dir() and any(output.iterdir()) and not (output / page.RESULT).is_file():
        raise UserError(f"--output {output} has files in it and no replay: name a folder of its own")


def _check_pairs(run: Run, folder: RunFolder, update: int) -> None:
    """Raises UserError where the pairs are known to be others than those of the run at that update."""
    known = history.pairs_of_run(folder, update)
    if known is not None and known != run.fingerprints["data"]:
        raise UserError(
            f"{run.config.data.data} does not hold the {run.things} that the run was trained on: name them with --data"
        )


def _otherwise(config: Config, asked: Asked) -> Config:
    """The settings of the updates that are made with something changed. Raises UserError where they do not go together."""
    changed = change(config, **asked.changes)
    for note in without_effect(flatten(changed), asked.changes, specs()):
        log.warning("%s", note)
    return changed


def _changes(before: Config, after: Config, asked: Asked) -> dict[str, list[Any]]:
    """The settings that were asked to change, each as it was and as it became."""
    old, new = flatten(before), flatten(after)
    return {name: [old[name], new[name]] for name in asked.changes}


def _tell(asked: Asked, folder: RunFolder, saved: Any, before: int, last: int) -> None:
    taken = history.cost(folder, before + 1, last)
    start = f"checkpoint {saved.path.name}" if saved else "the start: no checkpoint before it is kept"
    log.info(
        "replaying updates %d to %d from %s: %s%s%s",
        before + 1, last, start, number_of(last - before, "updates"),
        "" if taken is None else f", which took the run {duration(taken)}",
        ", the changed ones twice" if asked.otherwise else "",
    )  # fmt: skip


def _pictures(run: Run, shown: list[pairs.OnePair]) -> list[Image.Image]:
    """The images of each pair, one after another. Also says of the pairs where they lie."""
    found = []
    for pair in shown:
        pair.images = pictures.places(run, pair)
        found += pictures.pictures(run, pair)
    return found

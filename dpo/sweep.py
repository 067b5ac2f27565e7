"""Train every combination of some settings, and compare them in one table and one plot.

    python -m dpo.sweep --out SWEEP --beta 1000,2000,5000 --method dpo,dde --model MODEL --data STORE --reference recorded ...

A flag with values between commas is an axis of the grid; every other flag is dpo.train's and holds for all runs. Axes can be
the settings of the method, the optimizer and LoRA, the seed, the precision and the labels; a prepared store with
recorded reference errors serves all of them but other seeds and precisions. Each run has a folder of its own below SWEEP.
The same command again skips finished runs and goes on with the one that was interrupted, with --overwrite too: that
replaces what lies in a run's folder and is no run.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo.common import command
from dpo.common.errors import UserError
from dpo.settings.config import Config, change, flatten, specs
from dpo.settings.fields import coerce

# What may be an axis: the settings of these groups, and these single settings.
GROUPS = ("method", "optim", "lora")
AXES = ("seed", "precision", "caption_dropout", "label_smoothing")

FLAGS_FILE = "flags.txt"  # the flags that hold for all runs
ASKED_FILE = "settings.json"  # each run's settings as they were asked for: a run's own file has those decided later

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when every run finished, 1 when some failed, 2 after a user's mistake, 130 when interrupted."""
    return command.run("dpo.sweep", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    out, grid, rest = read(argv)
    console.setup()
    return sweep(out, grid, rest)


def read(argv: Sequence[str]) -> tuple[Path, dict[str, list[str]], list[str]]:
    """A command line as (folder, values by axis, flags that hold for every run). Raises UserError."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(__doc__ or "")
        raise SystemExit(0)
    spellings = {name: spec for spec in specs().values() for name in (spec.name, *spec.meta["aliases"])}
    words, rest, grid, out = list(argv), [], {}, None
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        follows = not equals and bool(words) and not words[0].startswith("--")  # no flag is the value of another
        value = words[0] if follows else value
        key = name.removeprefix("--").replace("-", "_")
        if key in ("out", "output", "output_dir") and name.startswith("--"):
            out = value or None
            del words[:follows]
            continue
        spec = spellings.get(key) if name.startswith("--") else None
        axis = spec is not None and not spec.many and (spec.group in GROUPS or spec.name in AXES)
        if spec is not None and axis and "," in value:
            del words[:follows]
            values = [part.strip() for part in value.split(",")]
            if "" in values:
                raise UserError(f"{name} {value}: a value between the commas is empty")
            distinct: dict[Any, str] = {}
            for one in values:
                distinct.setdefault(coerce(spec, one), one)  # 1e3 is 1000
            if len(distinct) == 1:
                raise UserError(
                    f"{name} {value}: the values between the commas are the same; give others, or one alone"
                )
            grid[spec.name] = list(distinct.values())
        else:
            rest.append(word)
    if out is None:
        raise UserError("name the folder of the sweep: --out FOLDER")
    if not grid:
        from dpo.settings.flags import read_flags

        read_flags(rest)  # refuses a misspelt axis, which is the likelier mistake
        raise UserError("nothing to compare: give a flag several values, such as --beta 1000,2000,5000")
    return Path(out).expanduser(), grid, rest


def cells(grid: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination, the last axis changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def sweep(out: Path, grid: dict[str, list[str]], rest: list[str]) -> int:
    """Makes the runs that are not finished, one after another, and writes the comparison after each; the exit code."""
    from dpo.common import locks
    from dpo.common.files import write_text
    from dpo.evaluating.flags import check_scorers
    from dpo.pages.sweep import name_of
    from dpo.settings.flags import parse

    runs = cells(grid)
    configs = []
    for cell in runs:  # every mistake is found before the first run starts
        own = [f"{specs()[axis].flag}={value}" for axis, value in cell.items()]  # one word: of a switch, or below 0
        config, notes = parse([*rest, *own, "--output", str(out / name_of(cell))])
        name = config.output.run_name and f"{config.output.run_name} {name_of(cell)}"  # a curve each at the trackers
        configs.append((change(config, run_name=name), notes))
    asked = {Path(config.output.output).name: _as_asked(config) for config, _ in configs}
    check_scorers(configs[0][0].output.evaluate)
    _check_records([config for config, _ in configs])
    flags = " ".join(rest)
    _check_folder(out, flags)  # before a lock is left in somebody's folder
    with locks.held(out, "--out"):
        if (before := _check_folder(out, flags)) is not None:
            _give_way(out)
            log.warning("%s held a sweep with other flags, which trained nothing and gives way: %s", out, before)
        asked = _with_finished(out, asked, [config for config, _ in configs])
        write_text(out / FLAGS_FILE, flags + "\n")
        write_text(out / ASKED_FILE, json.dumps(asked))
        return _all(out, runs, configs)


def _all(out: Path, runs: list[dict[str, str]], configs: list[tuple[Config, list[str]]]) -> int:
    """Makes the runs, those that are finished left as they are; the exit code."""
    from dpo.pages.sweep import compare, name_of

    codes: list[int] = []
    for number, (cell, (config, notes)) in enumerate(zip(runs, configs, strict=True), 1):
        log.info("run %d of %d: %s", number, len(runs), name_of(cell))
        codes.append(_run(Path(config.output.output), config, notes))
        compare(out, runs)
        if codes[-1] == command.INTERRUPTED:
            log.warning("%s", command.GOES_ON)
            return codes[-1]
    log.info("%s", "\n" + (out / "sweep.md").read_text(encoding="utf-8"))
    return 1 if any(codes) else 0


def _as_asked(config: Config) -> dict[str, Any]:
    """The settings of a run of one process as JSON has them. Raises UserError for pairs that do not divide."""
    from dpo.settings.resolve import dealt

    settings: dict[str, Any] = json.loads(json.dumps(flatten(dealt(config, 1))))
    return settings


def _with_finished(out: Path, asked: dict[str, dict[str, Any]], configs: list[Config]) -> dict[str, dict[str, Any]]:
    """`asked`, settings by run, with those of finished runs as they were made: a preset or --config may say others now.

    Raises UserError where they do, by the rules of a resume. Of runs of earlier versions nothing is known, nor of a
    setting that was none yet.
    """
    from dpo.pages.folder import read_json
    from dpo.settings.rules import resume_changes

    noted, made = read_json(out / ASKED_FILE), {}
    for config in configs:
        folder = Path(config.output.output)
        if not _finished(folder, config):
            continue
        now, before = asked[folder.name], noted.get(folder.name, {})
        said, refused = resume_changes(now | before, now, specs())
        if said or refused:
            raise UserError(
                f"{folder} is finished, with other settings than this command has now ({', '.join([*said, *refused])}): "
                "set them back where --config or --preset has them, or name another --out"
            )
        made[folder.name] = before
    return noted | asked | made


def _check_records(configs: list[Config]) -> None:
    """Raises UserError where runs that are not finished want recorded errors that the store lacks for them."""
    if configs[0].runtime.reference != "recorded":  # of all runs alike
        return
    from dpo.training.stored import check_records

    if left := [config for config in configs if not _finished(Path(config.output.output), config)]:
        check_records(left)


def _check_folder(out: Path, flags: str) -> str | None:
    """The flags of the sweep in `out` where they are others than `flags` and it trained nothing, so that it gives way.

    Raises UserError when the folder has another sweep that did, or somebody's files under the names of a sweep's.
    """
    from dpo.common.words import listed
    from dpo.pages.sweep import PAGES, folders_of
    from dpo.training.folder import has_trained

    note = out / FLAGS_FILE
    if not note.is_file():
        if others := [name for name in (FLAGS_FILE, ASKED_FILE, *PAGES) if (out / name).exists()]:
            raise UserError(
                f"{out} holds no sweep and has {', '.join(others)}, which would be replaced: name another --out"
            )
        return None
    before = note.read_text(encoding="utf-8").strip()
    if before == flags:
        return None
    trained = sorted(folder.name for folder in out.iterdir() if has_trained(folder))
    if trained or not folders_of(out):  # no table tells which folders are a sweep's
        told = f", begun in {listed(trained)}" if trained else ""
        raise UserError(
            f"{out} holds a sweep with other flags ({before}){told}: give the same ones to go on with it, or name another --out"
        )
    return before


def _give_way(out: Path) -> None:
    """Deletes the pages of the sweep in `out` and the notes on its failed runs."""
    from dpo.pages.folder import FAILED_FILE, not_of_a_run
    from dpo.pages.sweep import PAGES, folders_of

    folders = [out / name for name in folders_of(out) if not not_of_a_run(out / name)]  # else the note is somebody's
    for note in (*(folder / FAILED_FILE for folder in folders), *(out / page for page in PAGES)):
        if note.is_file():
            note.unlink()
    for folder in folders:
        with suppress(OSError):  # it holds something else, or was not made
            folder.rmdir()


def _run(folder: Path, config: Config, notes: list[str]) -> int:
    """Trains one run unless it is finished; its exit code. A user's mistake is written to failed.txt."""
    import torch

    from dpo.common.files import write_text
    from dpo.pages.folder import FAILED_FILE, holds_run
    from dpo.train import to_its_end
    from dpo.training.folder import check_output

    if _finished(folder, config):
        log.info("finished before: %s", folder)
        return 0
    replaced = config.output.overwrite and not holds_run(folder)
    config = change(config, resume="latest" if folder.is_dir() and not replaced else None, overwrite=replaced)
    try:
        check_output(config)
    except UserError as error:  # into a folder of somebody else's no note is written
        log.error("%s: %s", folder.name, error)
        return 1
    (folder / FAILED_FILE).unlink(missing_ok=True)
    try:
        return to_its_end(config, notes)
    except UserError as error:
        log.error("%s: %s", folder.name, error)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FAILED_FILE, f"{error}\n")
        return 1
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _finished(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` ended well after at least as many updates as are wanted now, or by the patience of now."""
    from dpo.pages.folder import SUMMARY_FILE, read_run

    if not (folder / SUMMARY_FILE).is_file():
        return False
    run = read_run(folder)
    if run.status == "finished" and (run.summary.get("kept") or {}).get("early"):  # more updates would not go on
        return bool(run.setting("patience") == config.output.patience)
    more = (config.optim.epochs or 0) > (run.setting("epochs") or 0)
    return run.status == "finished" and not more and run.done >= (config.optim.steps or run.wanted)


if __name__ == "__main__":
    sys.exit(main())

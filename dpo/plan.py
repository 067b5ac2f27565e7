"""Know before the download what a run will take: memory, FLOPs, hours and disk.

    python -m dpo.plan --preset sdxl                                        what it takes, and which cards it fits
    python -m dpo.plan --preset sdxl --memory 24                            the largest micro-batch, or what makes it fit
    python -m dpo.plan --preset sd15 --gpu H100 --mfu 0.3 --price 2.50      hours and cost
    python -m dpo.plan --model MODEL --data STORE --data-format store ...   any flags of dpo.train

Reads config files and no weights: those of SD 1.5, SD 2.1, SDXL and SDXL-Turbo come with the package. Memory and FLOPs are
those of the training step itself, run on tensors without content.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.common import command
from dpo.common.errors import UserError

if TYPE_CHECKING:
    from dpo.settings.config import Config

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 after a plan, 2 after a user's mistake (one line on stderr), 130 when interrupted."""
    return command.run("dpo.plan", lambda: _command(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> int:
    from dpo.settings.flags import parse

    if (started := command.of_launcher("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"started as {started} processes: a plan is made by one; leave out torchrun, and give --processes"
        )
    parser = make_parser()
    own, rest = parser.parse_known_args(list(argv))
    config, notes = parse(
        rest, also=[flag for action in parser._actions for flag in action.option_strings], with_pairs=False
    )
    for note in notes:
        sys.stderr.write(f"dpo.plan: {note}\n")
    return run(own, config)


def run(own: argparse.Namespace, config: Config) -> int:
    """Plans the run of `config`, prints the plan, and writes it as JSON where that is asked; the exit code."""
    from dpo.common import console
    from dpo.common.files import write_text
    from dpo.planning import cuda, fitting, page, recompute, work
    from dpo.planning.asked import Asked, peak_of
    from dpo.settings.config import change
    from dpo.train import train_step

    console.setup("WARNING")  # the trainer's own lines are on a run that trains
    asked = Asked(**{name: value for name, value in vars(own).items() if name != "json"})
    if asked.gpu is not None:
        peak_of(asked.gpu)  # refuses a misspelt name before the work
    if asked.measured is not None:
        work.measured(Path(asked.measured).expanduser())
    if asked.memory is not None and config.runtime.device == "cpu":
        raise UserError("--memory asks about a card: leave out --device cpu")
    if asked.price is not None and asked.gpu is None and asked.measured is None:
        raise UserError("--price has no effect without hours: give --gpu, or a run that was --measured")
    if own.json is not None and Path(own.json).expanduser().is_dir():
        raise UserError(f"--json {own.json} is a folder; name a file in it")
    if own.json is not None and not (parent := Path(own.json).expanduser().parent).is_dir():
        raise UserError(f"--json {own.json}: there is no folder {parent}; make it, or name another file")
    dry = work.planner(train_step, asked.processes)
    pairs = work.pairs_of(config) if asked.pairs is None else None
    config = work.prepared(config)
    told, room = [], 0.0 if asked.memory is None else cuda.room(asked.memory)
    auto = config.runtime.checkpointing == "auto" and config.runtime.device != "cpu"
    if auto and asked.memory is not None:
        choice, said = recompute.chosen(config, dry, room)
        config, told = change(config, checkpointing=choice.setting), [f"--checkpointing auto chooses {said}"]
    elif auto:
        told = ["--checkpointing auto is planned as on: with --memory GB the plan says what a run would choose"]
    plan = work.plan(config, asked, dry, pairs)
    sys.stdout.write("\n".join(page.page(plan, asked, told)) + "\n")
    sys.stdout.flush()
    for line in plan.warnings:
        log.warning("%s", line)
    found: dict[str, Any] = work.as_json(plan)
    if asked.memory is not None:
        widest = change(plan.config, checkpointing="on") if auto else plan.config
        best = fitting.largest(widest, asked, dry, room, _tell)
        sys.stdout.write(page.largest_line(best, plan, asked.memory, auto=auto) + "\n")
        found["largest_batch_size"] = best and best.config.optim.batch_size
        if not work.fits(plan, asked.memory):
            cheapest = fitting.cheapest(plan.config, asked, dry, room, _tell)
            sys.stdout.write("\n".join(page.cheapest_lines(cheapest, asked.memory)) + "\n")
            found["to_fit"] = cheapest and [one.flags for one in cheapest.changes]
    if own.json is not None:
        write_text(Path(own.json).expanduser(), json.dumps(found, indent=2) + "\n", "name another file with --json")
    return 0


def _tell(line: str) -> None:
    sys.stderr.write(f"dpo.plan: {line}\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's own flags; dpo.train's parser reads the others."""
    parser = command.Parser(
        prog="dpo.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of python -m dpo.train are understood as well.",
    )
    parser.add_argument(
        "--memory", type=_above, metavar="GB", help="of the card: largest micro-batch, or what makes it fit"
    )
    parser.add_argument("--gpu", metavar="NAME", help="for hours: H100, A100, RTX 4090, ...")
    parser.add_argument(
        "--mfu", type=_share, default=0.3, metavar="X",
        help="share of the GPU's peak that is reached, recomputed work included (default: 0.3)",
    )  # fmt: skip
    parser.add_argument("--measured", metavar="RUN", help="take the pairs/s of this run's folder instead")
    parser.add_argument("--price", type=_above, metavar="X", help="of an hour of one GPU, for the cost")
    parser.add_argument(
        "--pairs",
        type=_whole,
        metavar="N",
        help="of the data set, those that a run holds out among them, for disk and epochs (default: those of --data, where it "
        "is here)",
    )
    parser.add_argument(
        "--reference-draws",
        type=_whole,
        default=4,
        dest="draws",
        metavar="K",
        help="recorded for each pair (default: 4)",
    )
    parser.add_argument(
        "--processes", type=_whole, default=1, metavar="N", help="GPUs that train together (default: 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan there too, in bytes, FLOPs and seconds")
    return parser


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * (kind is int)}number") from None


def _above(text: str) -> float:
    value = _number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = _number(float, text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _whole(text: str) -> int:
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())

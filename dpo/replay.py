"""Ask a run why: go back before one of its updates, make that update again, and see which pairs it was made of.

    python -m dpo.replay runs/sd15 --update 1370                       the pairs of update 1370 by their share of its gradient
    python -m dpo.replay runs/sd15 --update 1370 --without -123456     updates 1360 to 1380 without that pair, both curves
    python -m dpo.replay runs/sd15 --update 1370 --beta 5000 --around 50
    python -m dpo.replay runs/sd15 --update 1370 --device cpu --data /elsewhere/pairs --model /elsewhere/model

The run's folder is only read, also while the run goes on. What is found goes to a folder beside it: replay.html,
replay.json and the pairs' images (docs/scaling.md, "Ask a run why").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.common import command
from dpo.common.errors import UserError
from dpo.common.words import printable
from dpo.settings.config import specs
from dpo.settings.fields import coerce

if TYPE_CHECKING:  # torch is imported only once the command line is read
    from dpo.replaying import work

CHANGES = ("beta", "method", "learning_rate")  # settings that updates can be made again with
PLACES = ("device", "data", "validation_data", "model")  # settings that say where things are here


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the update was replayed, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.replay", lambda: _command(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    given = make_parser().parse_args(list(argv))
    console.setup()
    asked = _asked(given)
    from dpo.pages import replay as page
    from dpo.replaying import work
    from dpo.train import train_step

    result = work.replay(asked, train_step)
    sys.stdout.write(printable(page.lines(result)) + f"{asked.output / page.PAGE}\n")
    return 0


def _asked(given: argparse.Namespace) -> work.Asked:
    """What the command line asks for. Raises UserError."""
    from dpo.replaying import work

    run = Path(given.run).expanduser()
    changes, places = _given(given, CHANGES), _given(given, PLACES)
    if given.around is not None and not (changes or given.without):
        raise UserError("--around has no effect without --without, --beta, --method or --learning-rate: leave it out")
    name = run.resolve().name
    output = given.output or run.resolve().with_name(f"{name}-replay-{given.update}")
    return work.Asked(
        run=run,
        update=given.update,
        output=Path(output).expanduser(),
        top=given.top,
        around=10 if given.around is None else given.around,
        without=tuple(given.without),
        changes=changes,
        places=places,
    )


def _given(given: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The settings of these names that are given. Raises UserError for a value that cannot be one."""
    return {name: coerce(specs()[name], value) for name in names if (value := getattr(given, name)) is not None}


def _key(text: str) -> int:
    try:
        key = int(text)
    except ValueError:
        key = 1 << 63
    if not -(1 << 63) <= key < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is no key of a pair: give a whole number, as the replay lists them")
    return key


def _at_least(least: int) -> Any:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    whole.__name__ = "whole number"
    return whole


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what is asked").add_argument
    add("run", metavar="RUN", help="output folder of a run")
    add(
        "--update", type=_at_least(1), required=True, metavar="N", help="the update, counted from 1 as in metrics.jsonl"
    )
    add("--top", type=_at_least(1), metavar="K", help="measure only the K pairs that pull most (default: all)")
    add(
        "--output",
        type=command.folder,
        metavar="FOLDER",
        help="where the result goes (default: beside the run, RUN-replay-N)",
    )
    add = parser.add_argument_group("made again with a change, from K updates before to K after").add_argument
    add("--without", nargs="+", type=_key, default=[], metavar="KEY", help="leave out the pairs of these keys")
    for name in CHANGES:
        add(specs()[name].flag, metavar="X" if name != "method" else "NAME", help=f"{name.replace('_', ' ')} instead")
    add("--around", type=_at_least(0), metavar="K", help="updates before and after (default: 10)")
    add = parser.add_argument_group("where things are here (default: where the run had them)").add_argument
    add("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--data", metavar="PAIRS", help="the training pairs, where they have moved")
    add("--validation-data", metavar="PAIRS", help="the held-out pairs, where they have moved")
    add("--model", metavar="MODEL", help="the model, where it has moved")
    return parser


if __name__ == "__main__":
    sys.exit(main())

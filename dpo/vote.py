"""Ask people: a small web page on this machine that shows two images of one prompt and keeps the votes.

    python -m dpo.vote --plan --prompts 200                           what a study can show, before anybody votes
    python -m dpo.vote images/base images/aligned --output study      declare a study of two folders, and serve it here
    python -m dpo.vote evaluation --output study                      the images that dpo.evaluate compared
    python -m dpo.vote study                                          go on with it
    python -m dpo.vote study --report                                 what the votes say
    python -m dpo.vote study --export pairs.parquet                   the votes as preference pairs, for dpo.train

Folders are what python -m dpo.sample drew, or images with a table of file and prompt; the first is the base. What is asked is
fixed before the first vote. Raters see no model's name, in no address and no file, and their names never leave this machine
(docs/vote.md).
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.common import command, locks
from dpo.common.errors import UserError, reading
from dpo.common.files import is_there
from dpo.common.words import excerpt, is_plain, number_of
from dpo.evaluating.flags import named
from dpo.sampling import flags
from dpo.voting.presets import PRESETS

if TYPE_CHECKING:  # torch is imported only once the command line is read
    from dpo.voting.declare import Wanted
    from dpo.voting.study import Question, Rule

LONGEST = 10_000  # characters of a text that raters read
STOPPED = "stopped; every answer is kept, and the same command goes on"
WAIT = 1.0  # seconds for another server to end

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when done, 2 after a mistake of the user's, 130 when the server was stopped."""
    return command.run("dpo.vote", lambda: _command(sys.argv[1:] if argv is None else argv), STOPPED)


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    given = make_parser().parse_args(list(argv))
    console.setup()
    _check_flags(given)
    if given.plan:
        return _plan(given)
    if not given.sides:
        raise UserError("nothing to ask about: name two folders of images and --output, or the folder of a study")
    if given.report or given.export is not None:
        if len(given.sides) > 1:
            raise UserError(f"--{'report' if given.report else 'export'} takes the folder of one study")
        return (_report if given.report else _export)(given, Path(given.sides[0]).expanduser())
    return _serve(given)


def _plan(given: argparse.Namespace) -> int:
    """Says what a study can show; a folder is a pilot, whose agreement is measured."""
    from dpo.voting import plan

    if len(given.sides) > 1:
        raise UserError("--plan takes no more than the folder of a pilot")
    said = plan.lines(
        prompts=given.prompts,
        votes=given.votes or 5,
        budget=given.budget,
        share=given.share,
        agreement=given.agreement,
        pilot=Path(given.sides[0]).expanduser() if given.sides else None,
    )
    sys.stdout.write("".join(f"{line}\n" for line in said))
    return 0


def _report(given: argparse.Namespace, folder: Path) -> int:
    from dpo.voting import report

    made = report.make(folder, scores=given.scores)
    sys.stdout.write("".join(f"{line}\n" for line in made.lines))
    return 0


def _export(given: argparse.Namespace, folder: Path) -> int:
    from dpo.voting import export

    for line in export.write(folder, Path(given.export).expanduser(), given.question, layout=given.layout):
        log.info("%s", line)
    return 0


def _serve(given: argparse.Namespace) -> int:
    """Declares a study where that is asked for, and serves it until it is stopped."""
    from dpo.voting import server, study  # the extra that it needs is missed before anything is read

    place = server.Place(given.host, given.port)
    folder = Path(given.output or given.sides[0]).expanduser()
    if given.output is None:
        if gone := [side for side in given.sides if not is_there(side.partition("=")[2] or side)]:
            raise UserError(f"{gone[0]}: no such folder; name folders of images, or a study")
        if len(given.sides) > 1 or not study.is_study(folder):
            raise UserError(
                f"--output is missing: where the study of {', '.join(given.sides)} and its votes shall lie, such as --output study"
            )
        if asked := _declaring(given):
            raise UserError(f"{folder} is a study, and fixed since it was declared: leave out {asked[0]}")
        with locks.held(folder, "the study", wait=WAIT):
            server.serve(folder, place, given.raters)
        return 0
    from dpo.voting import declare, raters

    wanted = _wanted(given)
    with locks.held(folder, "--output", wait=WAIT):
        if study.is_study(folder):
            declare.check_same(folder, wanted)
        else:
            declare.declare(folder, wanted)
        if given.declare:
            if given.raters:
                raters.invited(folder, given.raters)
                may = number_of(len(given.raters), "raters")
                log.info("%s may vote; their links are said when the study is served", may)
            return 0
        server.serve(folder, place, given.raters)
    return 0


OF = {  # what each of these ways to use the command takes beside its folder
    "--plan": ("plan", "prompts", "votes", "budget", "share", "agreement"),
    "--report": ("report", "scores"),
    "--export": ("export", "question", "layout"),
}
DECLARED = ("host", "port", "raters", "output")  # what a study takes that is declared


def _given(given: argparse.Namespace) -> list[str]:
    """The names of the flags that say something."""
    plain = vars(make_parser().parse_args([]))
    return [name for name, value in vars(given).items() if name != "sides" and value != plain[name]]


def _check_flags(given: argparse.Namespace) -> None:
    """Raises UserError for a flag that means nothing in the way that the command is used."""
    asked = _given(given)
    ways = [way for way in OF if way.removeprefix("--") in asked]
    if len(ways) > 1:
        raise UserError(f"{ways[0]} and {ways[1]}: give one")
    taken = (
        OF[ways[0]]
        if ways
        else {name for name in asked if name == "votes" or all(name not in of for of in OF.values())}
    )
    if idle := [name for name in asked if name not in taken]:
        of = next((way for way, names in OF.items() if idle[0] in names and way not in ways), None)
        why = f"is of {of}" if of else f"means nothing to {ways[0]}"
        raise UserError(f"--{idle[0].replace('_', '-')} {why}: leave it out")


def _declaring(given: argparse.Namespace) -> list[str]:
    """The flags given that only a study which is not declared yet can take."""
    return [f"--{name.replace('_', '-')}" for name in _given(given) if name not in DECLARED]


def _wanted(given: argparse.Namespace) -> Wanted:
    """What the command line asks for. Raises UserError."""
    from dpo.voting.declare import Wanted
    from dpo.voting.presets import INSTRUCTIONS, NOTICE

    return Wanted(
        sides=tuple(named(side) for side in given.sides),
        captions=None if given.captions is None else Path(given.captions).expanduser(),
        preset=given.study,
        questions=_questions(given.questions),
        tie=given.tie,
        votes=given.votes,
        title=None if given.title is None else _text("--title", given.title),
        instructions=INSTRUCTIONS if given.instructions is None else _file("--instructions", given.instructions),
        notice=NOTICE if given.notice is None else _file("--notice", given.notice),
        subset=given.subset,
        each=given.each,
        per_prompt=given.per_prompt,
        against_base=given.against_base,
        checks=given.checks,
        repeats=given.repeats,
        rule=_rule(given.rule),
        seed=given.seed,
    )


def _questions(texts: Sequence[str]) -> tuple[Question, ...]:
    """Questions from "TEXT" or "KEY=TEXT"; a key that is not given is q and the number."""
    from dpo.voting.study import Question

    found = []
    for number, text in enumerate(texts, 1):
        key, equals, rest = text.partition("=")
        has_key = equals and re.fullmatch(r"[a-z0-9_-]{1,40}", key)
        found.append(
            Question(key, _text("--questions", rest)) if has_key else Question(f"q{number}", _text("--questions", text))
        )
    keys = [question.key for question in found]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--questions: two are called {twice[0]}; give each a KEY=TEXT of its own")
    return tuple(found)


def _text(flag: str, text: str) -> str:
    if not text.strip() or len(text) > LONGEST or not is_plain(text):
        raise UserError(f"{flag} {excerpt(text)}: expected a text of at most {LONGEST:,} characters")
    return text.strip()


def _file(flag: str, name: str) -> str:
    path = Path(name).expanduser()
    with reading(f"{flag} {name}", "name a text file in UTF-8"):
        return _text(flag, path.read_text(encoding="utf-8-sig"))


def _rule(texts: Sequence[str]) -> Rule:
    """What leaves a rater out, from "broken=0.75" and "repeats=0.5"."""
    from dpo.voting.study import Rule

    found: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        if name not in ("broken", "repeats") or not re.fullmatch(r"0|1|[01]?\.\d+", share) or float(share) > 1:
            raise UserError(f"--rule {excerpt(text)}: expected broken=SHARE or repeats=SHARE, with a share from 0 to 1")
        found[name] = float(share)
    return Rule(**found)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 0.5:
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0 to 0.5")
    return value


_share.__name__ = "number"  # what argparse calls it


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.vote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count = flags.above(0)
    add = parser.add_argument_group("what is shown").add_argument
    add(
        "sides",
        nargs="*",
        metavar="[NAME=]FOLDER",
        help="the base, then what is compared with it: folders of images; or the output of dpo.evaluate; or a study",
    )
    add("--output", metavar="FOLDER", help="where the study is declared and its votes are kept")
    add(
        "--captions",
        metavar="TABLE",
        help="prompts of folders that dpo.sample did not draw: file, prompt, and category where known (default: a table in the folder)",
    )
    add(
        "--subset",
        type=count,
        metavar="N",
        help="so many prompts, chosen by a hash (default: all that the sides have in common)",
    )
    add(
        "--each",
        type=count,
        metavar="N",
        help="so many prompts of each category, chosen by a hash: 200 of HPSv2's four styles are the blog's 800",
    )
    add(
        "--per-prompt",
        type=count,
        default=1,
        metavar="N",
        help="pairs of images of a prompt, where the sides have several (default: 1)",
    )
    add(
        "--against-base",
        action="store_true",
        help="of three sides or more, pairs with the first alone (default: all pairs)",
    )
    add = parser.add_argument_group("what is asked").add_argument
    add(
        "--study",
        choices=tuple(PRESETS),
        help="a published study: dpo (three questions), versus (which image do you prefer?); five votes, no ties",
    )
    add(
        "--questions",
        nargs="+",
        default=[],
        metavar="[KEY=]TEXT",
        help="questions of your own (default: preference, appeal and alignment, as --study dpo)",
    )
    add("--votes", type=count, metavar="N", help="votes wanted for each pair and question (default: 5)")
    add(
        "--tie",
        action=argparse.BooleanOptionalAction,
        help='"can\'t tell" may be answered (default: yes, with --study no)',
    )
    add("--title", metavar="TEXT", help="of the page")
    add("--instructions", metavar="FILE", help="text that raters read first, instead of ours")
    add("--notice", metavar="FILE", help="notice of what the images may show, instead of ours")
    add(
        "--checks",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="of the questions of a rater, with a broken image or one image twice; never counted as votes (default: 0.05; 0: none)",
    )
    add(
        "--repeats",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="of a rater's votes, asked again with sides swapped; never counted as votes (default: 0.05)",
    )
    add(
        "--rule",
        nargs="+",
        default=[],
        metavar="WHAT=SHARE",
        help="what leaves a rater out, where the report does not count everybody: a smaller share of broken images told from sound ones (broken, "
        "default 0.75), or of repeats answered alike (repeats, default 0)",
    )
    add("--seed", type=flags.above(-1), default=0, metavar="N", help="of all that is chosen by a hash")
    add = parser.add_argument_group("who is asked, and where").add_argument
    add(
        "--raters",
        nargs="+",
        default=[],
        metavar="NAME",
        help="raters with a link each, who alone may vote then (default: whoever gives a name)",
    )
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="other than 127.0.0.1: others can reach the page, by a secret link (default: this machine alone)",
    )
    add("--port", type=flags.above(-1), default=8765, metavar="N", help="0 takes a free one (default: 8765)")
    add("--declare", action="store_true", help="declare the study and serve it later")
    add = parser.add_argument_group("before and after").add_argument
    add(
        "--plan",
        action="store_true",
        help="say what a study can show; with a folder, from the agreement of the votes there",
    )
    add("--prompts", type=count, metavar="N", help="of --plan: prompts that there are")
    add("--budget", type=count, metavar="N", help="of --plan: votes in all for one question")
    add(
        "--share",
        type=float,
        default=0.6,
        metavar="SHARE",
        help="of --plan: of the votes that the better model is thought to get (default: 0.6)",
    )
    add("--agreement", type=float, metavar="ALPHA", help="of --plan: Krippendorff's alpha, assumed")
    add(
        "--report",
        action="store_true",
        help="count the votes: votes.html, votes.json and votes.md in the study's folder",
    )
    add(
        "--scores",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="of --report: scorers to compare with the people, outputs of dpo.evaluate or NAME=TABLE",
    )
    add("--export", metavar="FILE", help="write the votes as preference pairs, parquet that dpo.train reads")
    add("--question", metavar="KEY", help="of --export: whose votes (default: the first question)")
    add("--layout", choices=("pickapic", "chosen-rejected"), default="pickapic", help="of --export (default: pickapic)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Is it better? Draw models on the same prompts and seeds, score the images, and say by how much and how surely.

    python -m dpo.evaluate                                             the embedded world: its start against your newest run
    python -m dpo.evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 runs/sd15 --prompts pickapic-v2-test --scorers pickscore
    python -m dpo.evaluate base=images/base dpo=images/dpo --scorers tiny-b     folders of images, ours or anybody's
    python -m dpo.evaluate BASE runs/a,runs/b,runs/c ...               three training seeds of one method
    python -m dpo.evaluate --scorers help                              which scorers there are

The first model or folder is the base, which the others are compared with. Each is drawn as python -m dpo.sample draws it; what
was drawn and scored is kept in the output folder, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.common import command
from dpo.common.errors import UserError
from dpo.common.files import is_there
from dpo.evaluating.flags import Method, check_scorers, named, table
from dpo.sampling import flags
from dpo.sampling.flags import START
from dpo.tiny import outcome

if TYPE_CHECKING:  # torch is imported only once the command line is read
    from dpo.evaluating.asked import Asked

RUNS = Path("runs")

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when there is a result, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.evaluate", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    words = command.in_words(argv, "--scorers", "--convert")
    if ("--scorers", "help") in itertools.pairwise(words):
        from dpo.scorers.scorer import listing

        sys.stdout.write(listing() + "\n")
        return 0
    if "--convert" in words:
        return _convert([word for word in words if word != "--convert"])
    console.setup()
    evaluated(argv or _of_world())
    return 0


def evaluated(words: Sequence[str]) -> Path:
    """Evaluates as a command line says; the path of its evaluation.json. Raises UserError."""
    given = make_parser().parse_args(list(words))
    from dpo.evaluating import work

    asked = _asked(given, shlex.join(["python", "-m", "dpo.evaluate", *words]))
    return work.evaluate(asked, Path(given.output).expanduser())


def _convert(words: Sequence[str]) -> int:
    """Converts published pickles, and says where the safetensors files are."""
    from dpo.scorers.convert import convert

    if not words or any(word.startswith("-") for word in words):
        raise UserError("--convert takes the published files alone, such as --convert ImageReward.pt")
    for word in words:
        sys.stdout.write(f"{convert(Path(word).expanduser())}\n")
    return 0


def _of_world() -> list[str]:
    """The command line without arguments: the embedded world's start against the newest run under runs/ that has it."""
    from dpo.pages.folder import ADAPTER_FILE, INDEX_FILE, SUMMARY_FILE, read_run

    found = [path.parent for path in RUNS.glob(f"*/{SUMMARY_FILE}")]
    ended = [folder for folder in found if any((folder / name).is_file() for name in (INDEX_FILE, ADAPTER_FILE))]
    mine = [folder for folder in ended if read_run(folder).embedded]
    if not mine:
        raise UserError(
            f"nothing to compare: there is no run of the embedded world under {RUNS}/; make one with python -m dpo.train, "
            "or name a base and a model: python -m dpo.evaluate BASE MODEL --prompts ... --scorers ..."
        )
    newest = max(mine, key=lambda folder: (folder / SUMMARY_FILE).stat().st_mtime)
    log.info("comparing the embedded model with %s", newest)
    sides = [f"start=start:{newest}", f"{newest.name}={newest}"]
    return [*sides, "--prompts", outcome.PROMPTS, *outcome.DRAWN, "--scorers", outcome.JUDGE, outcome.FAITHFUL]


def _asked(given: argparse.Namespace, words: str) -> Asked:
    """What the command line asks for. Raises UserError."""
    from dpo.evaluating import reproduce
    from dpo.evaluating.asked import Asked
    from dpo.sampling import work as sampling

    names = {field.name for field in dataclasses.fields(sampling.Asked)} - {"prompts", "guidance"}
    own = {name: value for name, value in vars(given).items() if name in names}
    prompts, guidance, scorers = tuple(given.prompts), given.guidance or (), tuple(given.scorers)
    if given.reproduce is not None:
        published = reproduce.table(given.reproduce)
        stated = published.stated()
        prompts, guidance = prompts or (stated["prompts"],), guidance or (stated["guidance"],)
        own["sampler"] = stated["sampler"].lower() if own["sampler"] == "model" else own["sampler"]
        own["steps"] = own["steps"] or stated["steps"]
        of_tables = [text.partition("=")[0] for text in given.scores]
        of_table = dict.fromkeys(name for scores in published.models.values() for name in scores)
        scorers = scorers or tuple(name for name in of_table if name not in of_tables)
    if len(given.sides) < 2:
        raise UserError("name at least two: the base, and what is compared with it (a model or a folder of images)")
    if not scorers and not given.scores and given.pairs is None:
        raise UserError("nothing to measure by: give --scorers (--scorers help lists them), --scores or --pairs")
    base, *others = [_method(side) for side in given.sides]
    if len(base.seeds) > 1:
        raise UserError(f"{given.sides[0]}: the base is one model; several training seeds are compared with it")
    sides = [one.name for method in (base, *others) for one in method.seeds]
    # Before anything is drawn; the hub is asked for weights once the sides are known to be there.
    called = check_scorers(scorers, [table(text)[0] for text in given.scores], hub=False)
    if given.reproduce is not None:
        reproduce.check(published, sides, called)
    if twice := sorted({name for name in sides if sides.count(name) > 1}):
        raise UserError(f"two sides are called {twice[0]}: call them apart, as NAME=MODEL")
    return Asked(
        base=base.seeds[0],
        others=tuple(others),
        draw=sampling.Asked(
            model="", prompts=prompts, guidance=guidance[0] if guidance else None, **{**own, "sheets": given.sheets}
        ),
        scorers=scorers,
        tables=tuple(table(text) for text in given.scores),
        captions=None if given.captions is None else Path(given.captions).expanduser(),
        guidance=guidance,
        pairs=given.pairs,
        split=given.split,
        half=given.half,
        reproduce=given.reproduce,
        command=words,
    )


def _method(side: str) -> Method:
    """A side of the command line: one model, or training seeds between commas; a folder whose own name has a comma is one.

    NAME=A,B is a method of that name, its seeds numbered; A,B and NAME=A,OTHER=B are called by the names of both.
    """
    name, equals, place = ("", "", side) if is_there(side) else side.partition("=")
    place = place if equals else side
    parts = [place] if is_there(place.removeprefix(START)) else place.split(",")
    if len(parts) == 1:
        one = named(side)
        return Method(one.name, (one,))
    if equals and not any("=" in part for part in parts):
        return Method(name.strip(), tuple(named(f"{name.strip()} {n}={part}") for n, part in enumerate(parts, 1)))
    seeds = tuple(map(named, side.split(",")))
    return Method(" + ".join(one.name for one in seeds), seeds)


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is compared").add_argument
    add(
        "sides",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="the base, then what is compared with it: models as in dpo.sample (start:FOLDER is what a run started from), "
        "or folders of images; training seeds of one method between commas",
    )
    add(
        "--captions",
        metavar="TABLE",
        help="prompts of a folder of images that dpo.sample did not draw: file, prompt and, where known, seed and category "
        "(default: metadata or prompts .csv, .tsv or .jsonl in the folder)",
    )
    add("--lora-base", metavar="MODEL", help="the model that LoRAs belong to (default: what their run says)")
    add("--cache-dir", metavar="FOLDER", help="where hub downloads are kept")
    add = parser.add_argument_group("by what").add_argument
    add(
        "--scorers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="scorers by name; help lists them; this, --scores or --pairs is needed",
    )
    add(
        "--scores",
        nargs="+",
        default=[],
        metavar="NAME=TABLE",
        help="numbers of another program's scorer: a table of file (or hash) and score; GenEval's results.jsonl is one",
    )
    add("--convert", metavar="FILE", help="alone: a published pickle of weights, once, into safetensors beside it")
    add("--half", action="store_true", help="scorers compute in bf16 (another name for the scores)")
    add("--pairs", metavar="DATA", help="labelled pairs: also the implicit preference accuracy of each model")
    add("--split", metavar="NAME", help="of --pairs")
    add("--reproduce", metavar="TABLE", help="draw as a published table says, and print its numbers beside: lpo, spo")
    flags.add_drawn(parser)
    flags.add_protocol(parser)
    parser.add_argument(
        "--guidance",
        type=flags.guidances,
        metavar="SCALE[,SCALE...]",
        help="guidance scale; of several the base is drawn with each, the rest with the first, and the base at its best is "
        "compared too",
    )
    add = parser.add_argument_group("where").add_argument
    add(
        "--output",
        type=command.folder,
        default="evaluation",
        metavar="FOLDER",
        help="evaluation.html and all that it is made from (default: evaluation)",
    )
    add("--sheets", type=flags.above(-1), default=4, metavar="N", help="contact sheets a model (default: 4)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

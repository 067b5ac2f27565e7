"""Preferences from scorers: label a set of pairs anew, or draw images, pair and label them. Peers' trainers read the result.

    python -m dpo.label --data PAIRS --scorers pickscore --output labels               every row of a set, its order kept
    python -m dpo.label runs/sd15 --prompts pickapic-v2-validation --seeds 4 --scorers pickscore --output labels
    python -m dpo.label base=MODEL runs/sd15 --prompts prompts.txt --seeds 4 --pairing all --scorers pickscore=2 hpsv2.1:FILE=1
    python -m dpo.label images/base images/other --pairing random --pairs-per-prompt 3 --scorers tiny-a --labels soft

Then `python -m dpo.train --preset sd15-lora-8gb --data labels`. Killed at any moment, the same command goes on (docs/label.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.common import command
from dpo.common.errors import UserError
from dpo.evaluating.flags import check_scorers, named, table
from dpo.sampling import flags

if TYPE_CHECKING:  # torch is imported only once the command line is read
    from dpo.labelling import work
    from dpo.settings.config import Data

PAIRINGS, LAYOUTS, LABELS = ("best-worst", "all", "random"), ("pickapic", "chosen-rejected"), ("hard", "soft")
OF_DATA = ("data_format", "split", "caption_column", "chosen_column", "rejected_column", "max_pairs")
OF_DRAWN = (
    "prompts", "prompt_column", "subset", "subset_seed", "seeds", "first_seed", "same_noise", "sampler", "steps", "width",
    "height", "batch", "precision", "vae_tile", "guidance", "lora_base", "pairing", "pairs_per_prompt", "min_margin", "captions",
    "seed",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when its part is done, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.label", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    named = ("--scorers", "--scorer")
    if any((flag, "help") in itertools.pairwise(command.in_words(argv, *named)) for flag in named):
        from dpo.scorers.scorer import listing

        sys.stdout.write(listing() + "\n")
        return 0
    given = make_parser().parse_args(list(argv))
    console.setup()
    from dpo.labelling import work

    asked = _asked(given)
    check_scorers([name for name, _ in asked.scorers])
    merge = [Path(part).expanduser() for part in given.merge or ()]
    work.label(asked, Path(given.output).expanduser(), command.shard_of(given.shard), merge)
    return 0


def _asked(given: argparse.Namespace) -> work.Asked:
    """What the command line asks for. Raises UserError."""
    from dpo.labelling import work
    from dpo.sampling import work as sampling

    parser = make_parser()
    _check_way(given, parser)
    tables = dict(table(text) for text in given.scores)
    if gone := [str(path) for path in tables.values() if not path.is_file()]:
        raise UserError(f"--scores: {gone[0]} is no file: name a table of scores")
    weights = dict(_weighted(text) for text in given.scorers)
    if len(weights) < len(given.scorers) or len(tables) < len(given.scores):
        raise UserError("--scorers: a scorer is named twice: give it one weight")
    if not weights and not tables:
        raise UserError("nothing to label by: give --scorers (--scorers help lists them) or --scores")
    models = tuple(named(text) for text in given.models)
    if twice := sorted({one.name for one in models if [other.name for other in models].count(one.name) > 1}):
        raise UserError(f"two models are called {twice[0]}: call them apart, as NAME=MODEL")
    pairs = None if given.data is None else _data(given, given.data)
    fit = None
    if given.fit_temperature is not None:
        fit = _data(given, given.fit_temperature) if given.fit_temperature else pairs
        if fit is None:
            raise UserError("--fit-temperature PAIRS: images that models draw have no labels, so name labelled pairs")
    soft = given.temperature is not None or fit is not None
    if soft and given.labels == "hard":
        raise UserError("--labels hard have no temperature: take --labels soft, or leave the temperature out")
    if given.temperature is not None and fit is not None:
        raise UserError("--temperature and --fit-temperature: give one")
    names = {field.name for field in dataclasses.fields(sampling.Asked)} - {"prompts", "model", "sheets", "layout"}
    drawn = {name: value for name, value in vars(given).items() if name in names}
    return work.Asked(
        scorers=tuple((name, weight) for name, weight in weights.items() if name not in tables),
        tables=tuple((name, path, weights.get(name, 1.0)) for name, path in tables.items()),
        pairs=pairs,
        models=models,
        draw=sampling.Asked(model="", prompts=tuple(given.prompts), sheets=0, **drawn) if given.models else None,
        captions=None if given.captions is None else Path(given.captions).expanduser(),
        half=given.half,
        pairing=given.pairing,
        per_prompt=given.pairs_per_prompt,
        min_margin=given.min_margin,
        seed=given.seed,
        labels="soft" if soft else given.labels or "hard",
        temperature=given.temperature,
        fit=fit,
        margin=given.margin,
        layout=given.layout,
        rows_per_file=given.rows_per_file,
        overwrite=given.overwrite,
        device=given.device,
        cache_dir=given.cache_dir,
    )


def _check_way(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UserError unless pairs or models are named, and for flags of the other way."""
    if (given.data is None) == (not given.models):
        raise UserError(
            "name what to label: --data PAIRS, or models and folders of images (MODEL ... --prompts ...); one of the two"
        )
    others: tuple[str, ...] = OF_DRAWN if given.data is not None else OF_DATA
    if given.data is None and given.fit_temperature:
        others = ()  # they are of its pairs
    wrong = [name for name in others if getattr(given, name) != parser.get_default(name)]
    if wrong:
        of = "images that models draw" if given.data is not None else "--data"
        raise UserError(f"--{wrong[0].replace('_', '-')} is of {of}: leave it out")
    if given.pairs_per_prompt != 1 and given.pairing != "random":
        raise UserError(f"--pairs-per-prompt is of --pairing random: {given.pairing} makes the pairs that it makes")


def _data(given: argparse.Namespace, place: str) -> Data:
    from dpo.data.labels import EVERY
    from dpo.settings.config import Data

    chosen: dict[str, Any] = {name: getattr(given, name) for name in OF_DATA}
    from dpo.tiny import paths

    return Data(data=str(paths.train_pairs_path()) if place == "embedded" else place, ties=EVERY, **chosen)


def _weighted(text: str) -> tuple[str, float]:
    """(scorer, weight) from "NAME" or "NAME=WEIGHT"; a path in the name may have an equals sign of its own."""
    name, equals, after = text.rpartition("=")
    try:
        weight = float(after) if equals else 1.0
    except ValueError:
        if ":" not in name:  # else a part of a path
            raise UserError(f"--scorers {text}: expected NAME or NAME=WEIGHT with a number") from None
        return text, 1.0
    if equals and not (0 < weight < math.inf and name):
        raise UserError(f"--scorers {text}: expected NAME or NAME=WEIGHT with a weight above 0")
    return (name, weight) if equals else (text, 1.0)


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.label", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what is labelled: pairs").add_argument
    add(
        "--data",
        metavar="PAIRS",
        help="any set that dpo.train reads, or embedded; every row, labelled or not; old labels go to old_label_0",
    )
    add("--data-format", default="auto", metavar="NAME", help="layout of the pairs, as of dpo.train (default: auto)")
    add("--split", default="train", metavar="NAME", help="of the set (default: train)")
    for name in ("caption", "chosen", "rejected"):
        add(f"--{name}-column", metavar="NAME", help=f"column of the {name} {'text' if name == 'caption' else 'image'}")
    add("--max-pairs", type=flags.above(0), metavar="N", help="the first N pairs")
    add = parser.add_argument_group("or: images of models").add_argument
    add("models", nargs="*", metavar="[NAME=]MODEL", help="models as in dpo.sample, or folders of images")
    add("--captions", metavar="TABLE", help="prompts of folders that dpo.sample did not draw, as in dpo.evaluate")
    add("--lora-base", metavar="MODEL", help="the model that LoRAs belong to (default: what their run says)")
    add("--pairing", choices=PAIRINGS, default="best-worst", help="of each prompt's images (default: best-worst)")
    add("--pairs-per-prompt", type=flags.above(0), default=1, metavar="N", help="with --pairing random (default: 1)")
    add(
        "--min-margin",
        type=flags.not_below_0,
        default=0.0,
        metavar="X",
        help="pair only images whose scores differ by X (default: 0)",
    )
    add("--seed", type=int, default=0, help="of random pairs, and of which image stands first (default: 0)")
    flags.add_drawn(parser)
    flags.add_protocol(parser)
    parser.add_argument("--guidance", type=flags.guidance, metavar="SCALE", help=flags.GUIDANCE)
    add = parser.add_argument_group("by what").add_argument
    add(
        "--scorers",
        "--scorer",
        nargs="+",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="scorers as in dpo.evaluate (help lists them); several vote, standardised over the set",
    )
    add(
        "--scores",
        nargs="+",
        default=[],
        metavar="NAME=TABLE",
        help="numbers of another program: a table of file or hash, and score",
    )
    add("--half", action="store_true", help="scorers compute in bf16 (another fingerprint)")
    add("--cache-dir", metavar="FOLDER", help="where hub downloads are kept")
    add = parser.add_argument_group("labels").add_argument
    add(
        "--labels",
        choices=LABELS,
        help="hard: p is 0, 0.5 or 1; soft: p = sigmoid(temperature x difference) (default: hard)",
    )
    add(
        "--temperature",
        type=flags.above_0,
        metavar="T",
        help="labels are soft, and this is their temperature (default: the scorer's own; of a vote 1)",
    )
    add(
        "--fit-temperature",
        nargs="?",
        const="",
        metavar="PAIRS",
        help="fit it on labelled pairs, half of the prompts, and judge it by the others (default: those of --data)",
    )
    add(
        "--margin",
        type=flags.not_below_0,
        metavar="X",
        help="differences up to X are ties (default: what the scorer cannot tell apart)",
    )
    add = parser.add_argument_group("where").add_argument
    add(
        "--output",
        default="labels",
        metavar="FOLDER",
        help="data/, label.json, summary.json, pairs.html (default: labels)",
    )
    add("--layout", choices=LAYOUTS, default="pickapic", help="columns (default: pickapic, all of Pick-a-Pic v2)")
    add(
        "--rows-per-file",
        type=flags.above(0),
        default=4096,
        metavar="N",
        help="pairs in a parquet file (default: 4096)",
    )
    add("--overwrite", action="store_true", help="make anew what is there; scores are kept")
    add("--shard", metavar="I/N", help="be process I of N (default: from torchrun's environment, else 0/1)")
    add(
        "--merge",
        nargs="+",
        metavar="PART",
        help="take the scores of folders that --shard made without a common disk, then label",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

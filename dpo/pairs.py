"""Preference pairs from your own rankings, and a look at any set of pairs before hours are spent on it.

    python -m dpo.pairs ranking.csv --output pairs               columns image, prompt, and score, stars or rank
    python -m dpo.pairs stars/ --prompt "a red fox" --output pairs   folders 5/ 4/ 3/ ..., captions beside the images or --prompt
    python -m dpo.pairs matches.csv --pair neighbours --output pairs  columns winner, loser, prompt: a tournament
    python -m dpo.pairs --check PAIRS --output look              counts, warnings and a contact sheet of what dpo.train reads

Then look at pairs/pairs.html, and `python -m dpo.train --preset sd15-lora-8gb --data pairs` (docs/pairs.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.common import command
from dpo.common.errors import UserError
from dpo.sampling import flags

if TYPE_CHECKING:  # torch is imported only once the command line is read
    from dpo.pairing.asked import Asked, Looking

PAIRINGS = ("all", "neighbours", "best-worst")
# Flags of one way alone, without those that both have.
OF_RANKING = (
    "images", "prompt", "image_column", "value_column", "group_column", "higher_is_better", "pair", "min_margin",
    "max_per_image", "seed", "embed",
)  # fmt: skip
OF_CHECK = ("data_format", "split", "max_pairs")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when all is written, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.pairs", lambda: _command(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    parser = make_parser()
    given = parser.parse_args(list(argv))
    if (given.ranking is None) == (given.check is None):
        raise UserError(
            "name a ranking (a table, or folders by stars) to make pairs of, or --check PAIRS; one of the two"
        )
    others = OF_CHECK if given.check is None else OF_RANKING
    if wrong := [name for name in others if getattr(given, name) != parser.get_default(name)]:
        flag = "higher-is-better or --lower-is-better" if wrong[0] == "higher_is_better" else wrong[0].replace("_", "-")
        raise UserError(f"--{flag} is of {'--check' if given.check is None else 'a ranking'}: leave it out")
    if given.prompt is not None and given.caption_column is not None:
        raise UserError("--prompt is the prompt of all images: leave --caption-column out, or --prompt")
    if given.seed != parser.get_default("seed") and given.max_per_image is None:
        raise UserError("--seed has no effect without --max-per-image: leave it out")
    console.setup()
    from dpo.pairing import work

    output = Path(given.output or ("pairs" if given.check is None else "pairs-check")).expanduser()
    if given.check is None:
        work.make(_asked(given), output)
        return 0
    from dpo.settings.config import Data
    from dpo.tiny import paths

    data = Data(
        data=str(paths.train_pairs_path()) if given.check == "embedded" else given.check,
        data_format=given.data_format,
        split=given.split,
        max_pairs=given.max_pairs,
        caption_column=given.caption_column,
        chosen_column=given.chosen_column,
        rejected_column=given.rejected_column,
    )
    work.check(data, output, _looking(given), overwrite=given.overwrite)
    return 0


def _asked(given: argparse.Namespace) -> Asked:
    from dpo.pairing.asked import Asked
    from dpo.pairing.choose import Rule
    from dpo.pairing.columns import Named

    return Asked(
        ranking=Path(given.ranking).expanduser(),
        columns=Named(
            image=given.image_column,
            number=given.value_column,
            prompt=given.caption_column,
            group=given.group_column,
            winner=given.chosen_column,
            loser=given.rejected_column,
        ),
        images=None if given.images is None else Path(given.images).expanduser(),
        prompt=given.prompt,
        higher_is_better=given.higher_is_better,
        rule=Rule(given.pair, given.min_margin, given.max_per_image, given.seed),
        embed=given.embed,
        overwrite=given.overwrite,
        looking=_looking(given),
    )


def _looking(given: argparse.Namespace) -> Looking:
    from dpo.pairing.asked import Looking

    return Looking(given.resolution, given.look, given.show)


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("a ranking becomes pairs")
    add, better = group.add_argument, group.add_mutually_exclusive_group()
    add(
        "ranking",
        nargs="?",
        metavar="RANKING",
        help="CSV, TSV or JSONL: a line an image, or a line a match; or folders by stars",
    )
    add(
        "--images",
        type=command.folder,
        metavar="FOLDER",
        help="what paths in the table are relative to (default: its folder)",
    )
    add(
        "--prompt",
        type=_some,
        metavar="TEXT",
        help="the prompt of all images, in place of the table's or those beside them",
    )
    add("--image-column", metavar="NAME", help="column of the image (default: image, file, path, ...)")
    add("--value-column", metavar="NAME", help="column of the number (default: score, stars, rating, rank, ...)")
    add(
        "--group-column",
        metavar="NAME",
        help="column within which images are compared (default: group; else the prompt)",
    )
    better.add_argument(
        "--higher-is-better",
        action="store_const",
        const=True,
        dest="higher_is_better",
        help="the best image has the highest number",
    )
    better.add_argument(
        "--lower-is-better",
        action="store_const",
        const=False,
        dest="higher_is_better",
        help="the best image has the lowest number",
    )
    add(
        "--pair",
        choices=PAIRINGS,
        default="all",
        help="which images of a group are paired (default: all of different numbers)",
    )
    add(
        "--min-margin",
        type=flags.not_below_0,
        default=0.0,
        metavar="X",
        help="pair only images whose numbers differ by X (default: 0)",
    )
    add(
        "--max-per-image",
        type=flags.above(0),
        metavar="N",
        help="pairs of a group that an image is in at most, chosen by a hash",
    )
    add("--seed", type=int, default=0, help="of that hash (default: 0)")
    add(
        "--embed", action="store_true", help="put the images into the set, as one parquet file (default: paths to them)"
    )
    add = parser.add_argument_group("or: any set of pairs is looked at").add_argument
    add("--check", metavar="PAIRS", help="any set that dpo.train reads, or embedded")
    add("--data-format", default="auto", metavar="NAME", help="layout of the pairs, as of dpo.train (default: auto)")
    add("--split", default="train", metavar="NAME", help="of the set (default: train)")
    add("--max-pairs", type=flags.above(0), metavar="N", help="the first N pairs")
    add = parser.add_argument_group("of both").add_argument
    add("--caption-column", metavar="NAME", help="column of the prompt (default: caption, prompt or text)")
    add("--chosen-column", metavar="NAME", help="column of the chosen image, or of the winner of a match")
    add("--rejected-column", metavar="NAME", help="column of the rejected image, or of the loser of a match")
    add(
        "--resolution",
        type=flags.above(0),
        default=512,
        metavar="N",
        help="pixels that you will train on (default: 512; SDXL: 1024)",
    )
    add(
        "--look",
        type=flags.above(0),
        default=2000,
        metavar="N",
        help="pairs whose images are opened; of more a hash chooses (default: 2000)",
    )
    add("--show", type=flags.above(0), default=48, metavar="N", help="pairs on the page (default: 48)")
    add = parser.add_argument_group("where").add_argument
    add(
        "--output",
        type=command.folder,
        metavar="FOLDER",
        help="pairs.html, sheet.png, summary.json and, of a ranking, the pairs (default: pairs; with --check pairs-check)",
    )
    add("--overwrite", action="store_true", help="replace what this command made there otherwise")
    return parser


def _some(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; a variable of the shell may be empty")
    return text.strip()


if __name__ == "__main__":
    sys.exit(main())

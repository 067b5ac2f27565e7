"""Draw images from prompts by a stated protocol: a PNG each, contact sheets, the same bytes however often interrupted.

    python -m dpo.sample embedded --output images/base                                    the small model, its prompts
    python -m dpo.sample runs/sd15 --prompts pickapic-v2-test --output images/sd15        a run's result, a public set
    python -m dpo.sample runs/sd15 --prompts "a red fox" "a blue boat" --seeds 4 --output images/try
    python -m dpo.sample runs/sd15 --base stable-diffusion-v1-5/stable-diffusion-v1-5 --init-image examples --strength 0.6,0.7,0.8 ...

MODEL is a diffusers folder, a hub id, a .safetensors file, a LoRA (with --lora-base), the output folder of a run, what that
run started from (start:FOLDER), or "embedded". Killed at any moment, the same command goes on. Each PNG says its prompt, seed
and protocol (docs/sample.md).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.common import command
from dpo.common.errors import UserError
from dpo.sampling import flags

OF_MERGE = ("merge", "output", "sheets", "layout", "prompts", "prompt_column", "subset", "subset_seed", "seeds")
LAYOUTS = ("hpsv2", "geneval", "dpg")

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when all images are there, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.sample", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    given = make_parser().parse_args(list(argv))
    console.setup()
    folder = Path(given.output).expanduser()
    from dpo.sampling import work
    from dpo.sampling.model import EXAMPLES

    if given.merge is not None:
        _check_merge(given)
        parts = [Path(part).expanduser() for part in given.merge]
        work.merge(folder, parts, work.Asked(**_asked(given)))
        return 0
    if given.model is None:
        raise UserError(f"no model to draw with: name {EXAMPLES}")
    if given.init_image is None and given.strength:
        raise UserError("--strength is how far an --init-image is left behind: give one, or leave --strength out")
    strengths = given.strength or ((0.6,) if given.init_image is not None else ())
    work.draw(work.Asked(**_asked(given) | {"strength": strengths}), folder, command.shard_of(given.shard))
    return 0


def _check_merge(given: argparse.Namespace) -> None:
    """Raises UserError for a flag that says nothing of images which are drawn already."""
    parser = make_parser()
    for name, value in vars(given).items():
        if name not in OF_MERGE and value != parser.get_default(name):
            flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise UserError(f"--merge joins what is drawn already, and {flag} is of the drawing: leave it out")


def _asked(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of work.Asked that the command line gives."""
    own = {name: value for name, value in vars(given).items() if name not in ("output", "shard", "merge")}
    return own | {"prompts": tuple(given.prompts), "strength": given.strength or (), "model": given.model or ""}


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what draws").add_argument
    add("model", nargs="?", metavar="MODEL", help="what to draw with")
    add("--base", metavar="MODEL", help="another model, drawn alike into OUTPUT/base and shown beside in the sheets")
    add(
        "--lora-base",
        metavar="MODEL",
        help="the model that a LoRA belongs to (default: what its run's config.toml says)",
    )
    add("--cache-dir", metavar="FOLDER", help="where hub downloads are kept")
    flags.add_drawn(parser)
    flags.add_protocol(parser)
    parser.add_argument("--guidance", type=flags.guidance, metavar="SCALE", help=flags.GUIDANCE)
    add = parser.add_argument_group("from an image (SDEdit)").add_argument
    add(
        "--init-image",
        metavar="FILE",
        help="an image, a folder of them, or examples; without --prompts a file's name is its prompt",
    )
    add(
        "--strength",
        type=flags.strengths,
        default=(),
        metavar="S[,S...]",
        help="share of the denoising that is done, a row of sheets (default: 0.6)",
    )
    add = parser.add_argument_group("where").add_argument
    add(
        "--output",
        required=True,
        type=command.folder,
        metavar="FOLDER",
        help="images/, protocol.json and sheets/ come here",
    )
    add(
        "--sheets",
        type=flags.above(-1),
        default=12,
        metavar="N",
        help="contact sheets at most, of 8 prompts each (default: 12)",
    )
    add("--layout", choices=LAYOUTS, help="also the folder that this benchmark's own scorer reads")
    add(
        "--shard", metavar="I/N", help="be process I of N, such as 0/4 (default: from torchrun's environment, else 0/1)"
    )
    add("--merge", nargs="+", metavar="PART", help="join folders that --shard drew apart into OUTPUT")
    return parser  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

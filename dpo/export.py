"""Hand a result on: a run as the file that ComfyUI, A1111, Forge, sd-scripts or diffusers reads.

    python -m dpo.export runs/sd15 --to comfyui                     a full fine-tune: runs/sd15.safetensors, one file, all parts
    python -m dpo.export runs/sdxl-lora --to a1111                  a LoRA, under the names that A1111 and Forge read
    python -m dpo.export runs/sdxl-lora --to single-file --merge --fp16     its base with the LoRA folded in, half the bytes
    python -m dpo.export runs/sd15 --to diffusers --fp16            a diffusers folder in half precision

RUN is the output folder of a run; a diffusers folder, a hub id and a LoRA (with --lora-base) are taken too. Nothing is
replaced: a file that is there already is refused (docs/use.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.common import command
from dpo.common.words import printable
from dpo.exporting.asked import TARGETS, Asked


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the file is written, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.export", lambda: _command(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    given = make_parser().parse_args(list(argv))
    console.setup()
    from dpo.exporting import work

    output = None if given.output is None else Path(given.output).expanduser()
    path = work.export(Asked(**vars(given) | {"output": output}))
    sys.stdout.write(f"{printable(str(path))}\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags."""
    parser = command.Parser(
        prog="dpo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a run, a diffusers folder, a hub id or a LoRA")
    parser.add_argument("--to", required=True, choices=TARGETS, help="what will read it")
    parser.add_argument("--fp16", action="store_true", help="in half precision; a number that does not fit is refused")
    parser.add_argument("--merge", action="store_true", help="fold a LoRA into its base: the result is a whole model")
    parser.add_argument(
        "--output",
        type=command.folder,
        metavar="PATH",
        help="the file, or a folder for it; the folder itself with --to diffusers of a whole model "
        "(default: beside the run, named after it)",
    )
    parser.add_argument(
        "--lora-base",
        metavar="MODEL",
        help="the model that a LoRA belongs to (default: what its run's config.toml says)",
    )
    parser.add_argument("--cache-dir", metavar="FOLDER", help="where hub downloads are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())

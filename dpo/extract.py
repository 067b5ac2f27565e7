"""A small LoRA from a whole aligned model: the singular value decomposition of what it changed in its base.

    python -m dpo.extract runs/sd15 --base stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64
    python -m dpo.extract runs/sdxl --base BASE --energy 0.95 --max-rank 128      each layer with the rank that it needs
    python -m dpo.extract merge.safetensors --base base.safetensors --rank 32 --lora-format kohya --fp16

ALIGNED and BASE are run folders, diffusers folders, hub ids or single files. Nothing is clamped. What is left out
(biases and norms, and layers outside the blocks) is listed with its share; a table by layer lies beside the LoRA (docs/use.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.common import command
from dpo.common.errors import UserError
from dpo.common.words import printable
from dpo.exporting.asked import SUFFIX, beside, file_at
from dpo.sampling import flags


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the LoRA is written, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.extract", lambda: _command(sys.argv[1:] if argv is None else argv))


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console
    from dpo.common.files import made, write_text

    given = make_parser().parse_args(list(argv))
    console.setup()
    if (given.rank is None) == (given.energy is None):
        raise UserError("say how much to keep: --rank 64, or --energy 0.95; one of them")
    if given.max_rank is not None and given.energy is None:
        raise UserError("--max-rank has no effect without --energy: leave it out")
    output = _output(given)
    from dpo.exporting import extracting, table

    wanted = {"max_rank": given.max_rank} if given.max_rank is not None else {}
    with made(output.parent, "--output"):
        found = extracting.extract(
            extracting.Asked(
                aligned=given.aligned,
                base=given.base,
                output=output,
                rank=given.rank,
                energy=given.energy,
                kohya=given.lora_format == "kohya",
                fp16=given.fp16,
                device=given.device,
                cache_dir=given.cache_dir,
                **wanted,
            )
        )
        layers = output.with_suffix(".csv")
        write_text(layers, table.table(found), "start the same command again")
    sys.stdout.write(printable("\n".join([*table.lines(found, given.energy), str(layers), str(output)])) + "\n")
    return 0


def _output(given: argparse.Namespace) -> Path:
    """The file of the LoRA, which is not there yet. Raises UserError."""
    place = beside(given.aligned)
    name = f"{place.name}-lora{SUFFIX}"
    path = place.parent / name if given.output is None else file_at(Path(given.output).expanduser(), name)
    for one in (path, path.with_suffix(".csv")):
        if one.exists():
            raise UserError(f"{one} is there already: remove it, or name another file with --output")
    return path


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and up to 1")
    return value


_share.__name__ = "number"  # what argparse calls it: "invalid number value: 'x'"


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's flags, in groups by what a user wants."""
    parser = command.Parser(
        prog="dpo.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("aligned", metavar="ALIGNED", help="the aligned model")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model that it was trained from")
    add = parser.add_argument_group("how much to keep (one of the first two)").add_argument
    add("--rank", type=flags.above(0), metavar="R", help="rank of every layer")
    add("--energy", type=_share, metavar="SHARE", help="least share of each layer's squared change, such as 0.95")
    add("--max-rank", type=flags.above(0), metavar="R", help="highest rank of a layer with --energy (default: 128)")
    add = parser.add_argument_group("the file").add_argument
    add(
        "--output",
        type=command.folder,
        metavar="PATH",
        help="the file, or a folder for it (default: beside ALIGNED, its name with -lora)",
    )
    add(
        "--lora-format",
        choices=("diffusers", "kohya"),
        default="diffusers",
        help="key names: of diffusers, or of sd-scripts, which ComfyUI, A1111 and Forge read (default: diffusers)",
    )
    add("--fp16", action="store_true", help="in half precision")
    add = parser.add_argument_group("where").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--cache-dir", metavar="FOLDER", help="where hub downloads are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())

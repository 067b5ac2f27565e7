"""Draw images from prompts by a stated protocol: a PNG each, contact sheets, the same bytes however often interrupted.

    python -m dpo.sample embedded --output images/base                                    the small model, its prompts
    python -m dpo.sample runs/sd15 --prompts pickapic-v2-test --output images/sd15        a run's result, a public set
    python -m dpo.sample runs/sd15 --prompts "a red fox" "a blue boat" --seeds 4 --output images/try
    python -m dpo.sample runs/sd15 --base stable-diffusion-v1-5/stable-diffusion-v1-5 --init-image examples --strength 0.6,0.7,0.8 ...

MODEL is a diffusers folder, a hub id, a .safetensors file, a LoRA (with --lora-base), the output folder of a run, or
"embedded". Killed at any moment, the same command goes on. Each PNG says its prompt, seed and protocol (docs/sample.md).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo.common import command
from dpo.common.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LAYOUTS = ("hpsv2", "geneval", "dpg")
SAMPLERS = ("model", "ddim", "ddpm", "pndm", "euler", "euler-a", "heun", "dpm++", "dpm++-karras", "unipc")

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
        work.merge(folder, [Path(part).expanduser() for part in given.merge], given.sheets)
        return 0
    if given.model is None:
        raise UserError(f"no model to draw with: name {EXAMPLES}")
    if given.init_image is None and given.strength:
        raise UserError("--strength is how far an --init-image is left behind: give one, or leave --strength out")
    strengths = given.strength or ((0.6,) if given.init_image is not None else ())
    own = {name: value for name, value in vars(given).items() if name not in ("output", "shard", "merge", "strength")}
    own["prompts"] = tuple(given.prompts)
    work.draw(work.Asked(**own, strength=strengths), folder, command.shard_of(given.shard))
    return 0


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
    add = parser.add_argument_group("what is drawn").add_argument
    add(
        "--prompts",
        nargs="+",
        default=[],
        metavar="PROMPT",
        help="texts, one file (.txt, .csv, .tsv, .jsonl, .json, .parquet), a folder of .txt files, or a set by name, from "
        "the hub or NAME:FOLDER: pickapic-v1-validation, pickapic-v1-test, pickapic-v2-validation, pickapic-v2-test, "
        "partiprompts, hpsv2, embedded (default with the embedded model)",
    )
    add("--prompt-column", metavar="NAME", help="column of a table (default: prompt, caption or text)")
    add(
        "--subset", type=_above(0), metavar="N", help="N of the prompts, by a hash of each: stable whatever their order"
    )
    add("--subset-seed", type=int, default=0, metavar="SEED", help="another such choice (default: 0)")
    add("--seeds", type=_above(0), default=1, metavar="N", help="images of each prompt (default: 1)")
    add("--first-seed", type=_seed, default=0, metavar="SEED", help="number of the first seed (default: 0)")
    add(
        "--same-noise",
        action="store_true",
        help="one noise for all prompts: the number seeds an image, not a hash with the prompt",
    )
    add = parser.add_argument_group("how: the protocol").add_argument
    add("--sampler", default="model", choices=SAMPLERS, help="(default: model, the one that it comes with)")
    add("--steps", type=_above(0), metavar="N", help="denoising steps (default: 50; Turbo 4)")
    add("--guidance", type=_guidance, metavar="SCALE", help="guidance scale (default: 7.5; SDXL 5, Turbo 0)")
    add("--width", type=_side, metavar="PIXELS", help="of an image (default: as the model was trained)")
    add("--height", type=_side, metavar="PIXELS", help="of an image (default: as the model was trained)")
    add(
        "--batch",
        type=_above(0),
        metavar="N",
        help="images drawn together; rounding depends on it (default: 4; on a GPU up to 32, as the model needs)",
    )
    add(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="(default: fp32 on a CPU, fp16 on a GPU; SDXL's VAE always fp32)",
    )
    add(
        "--vae-tile",
        type=_side,
        default=0,
        metavar="PIXELS",
        help="decode in tiles of this side: less memory, slightly other images",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add = parser.add_argument_group("from an image (SDEdit)").add_argument
    add(
        "--init-image",
        metavar="FILE",
        help="an image, a folder of them, or examples; without --prompts a file's name is its prompt",
    )
    add(
        "--strength",
        type=_strengths,
        default=(),
        metavar="S[,S...]",
        help="share of the denoising that is done, a row of sheets (default: 0.6)",
    )
    add = parser.add_argument_group("where").add_argument
    add("--output", required=True, metavar="FOLDER", help="images/, protocol.json and sheets/ come here")
    add(
        "--sheets",
        type=_above(-1),
        default=12,
        metavar="N",
        help="contact sheets at most, of 8 prompts each (default: 12)",
    )
    add("--layout", choices=LAYOUTS, help="also the folder that this benchmark's own scorer reads")
    add("--shard", metavar="I/N", help="be process I of N (default: from torchrun's environment, else 0/1)")
    add("--merge", nargs="+", metavar="PART", help="join folders that --shard drew apart into OUTPUT")
    return parser  # fmt: skip


def _above(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value <= least:
            raise argparse.ArgumentTypeError(f"{text} is not above {least}")
        return value

    whole.__name__ = "whole number"
    return whole


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 2^32 - 1")
    return value


def _side(text: str) -> int:
    value = int(text)
    if value < 8 or value % 8:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 8")
    return value


def _guidance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 1000")
    return value


def _strengths(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: expected different numbers above 0 and at most 1")
    return values


if __name__ == "__main__":
    sys.exit(main())

"""Flags of what is drawn and how: those of dpo.sample and of every command that draws by a protocol. No torch here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

LARGEST = 16384  # pixels of a side
START = "start:"  # before the folder of a run: the model that it started from
GUIDANCE = (
    "guidance scale (default: SD 7.5, SDXL 5, SD 3 7, FLUX.1 3.5, FLUX.2 and Qwen-Image 4; of a few steps' model 0)"
)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SAMPLERS = ("model", "ddim", "ddpm", "pndm", "euler", "euler-a", "heun", "dpm++", "dpm++-karras", "unipc")


def add_drawn(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose prompts and seeds."""
    add = parser.add_argument_group("what is drawn").add_argument
    add(
        "--prompts",
        nargs="+",
        action="extend",
        default=[],
        metavar="PROMPT",
        help="texts, one file (.txt, .csv, .tsv, .jsonl, .json, .parquet), a folder of .txt files, or a set by name, from "
        "the hub or NAME:FOLDER: pickapic-v1-validation, pickapic-v1-test, pickapic-v2-validation, pickapic-v2-test, "
        "partiprompts, hpsv2, imagenet-classes (in the package), embedded (default with the embedded model; "
        "embedded:judged are the first 160, embedded:tuning 160 others)",
    )
    add("--prompt-column", metavar="NAME", help="column of a table (default: prompt, caption or text)")
    add("--subset", type=above(0), metavar="N", help="N of the prompts, by a hash of each: stable whatever their order")
    add("--subset-seed", type=int, default=0, metavar="SEED", help="another such choice (default: 0)")
    add("--seeds", type=above(0), default=1, metavar="N", help="images of each prompt (default: 1)")
    add("--first-seed", type=seed, default=0, metavar="SEED", help="number of the first seed (default: 0)")
    add(
        "--same-noise",
        action="store_true",
        help="one noise for all prompts: the number seeds an image, not a hash with the prompt",
    )


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how an image is drawn, but for the guidance, of which a command may take several."""
    add = parser.add_argument_group("how: the protocol").add_argument
    add("--sampler", default="model", choices=SAMPLERS, help="(default: model, the one that it comes with)")
    add("--steps", type=above(0), metavar="N", help="denoising steps (default: 50; Turbo 4)")
    add("--width", type=side, metavar="PIXELS", help="of an image (default: as the model was trained)")
    add("--height", type=side, metavar="PIXELS", help="of an image (default: as the model was trained)")
    add(
        "--batch",
        type=above(0),
        metavar="N",
        help="images drawn together; rounding depends on it (default: 4; on a GPU up to 32, as the model needs)",
    )
    add(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        help="(default: fp32 on a CPU, fp16 on a GPU, where flows take bf16; SDXL's VAE always fp32)",
    )
    add(
        "--vae-tile",
        type=tile,
        default=0,
        metavar="PIXELS",
        help="decode in tiles of this side: less memory, slightly other images",
    )
    add(
        "--text-tokens",
        type=above(0),
        metavar="N",
        help="tokens of a caption, of a flow (default: as runs that are drawn with had it, else as its pipeline has it)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def above(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value <= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least + 1}")
        return value

    whole.__name__ = "whole number"
    return whole


def above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_below_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"needs a number of at least 0, not {text!r}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 2^32 - 1")
    return value


def side(text: str) -> int:
    value = int(text)
    if not 8 <= value <= LARGEST or value % 8:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 8 from 8 to {LARGEST}")
    return value


def tile(text: str) -> int:
    """Of 8 pixels to a latent and tiles that share a quarter of their side: others do not meet, and the image would be larger."""
    value = side(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 32: tiles overlap by a quarter, in whole latents")
    return value


def guidance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 1000")
    return value


def guidances(text: str) -> tuple[float, ...]:
    """One guidance scale, or several between commas."""
    values = tuple(guidance(part) for part in text.split(","))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: expected different numbers")
    return values


def strengths(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: expected different numbers above 0 and at most 1")
    return values


NUMBERS = "numbers between commas"  # what argparse calls them: "invalid numbers between commas value: '5,x'"
seed.__name__ = side.__name__ = tile.__name__ = "whole number"
above_0.__name__ = guidance.__name__ = "number"
guidances.__name__ = strengths.__name__ = NUMBERS

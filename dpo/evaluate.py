"""Is it better? Draw models on the same prompts and seeds, score the images, and say by how much and how surely.

    python -m dpo.evaluate                                             the embedded world: its start against your newest run
    python -m dpo.evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 runs/sd15 --prompts pickapic-v1-validation --scorers pickscore
    python -m dpo.evaluate base=images/base dpo=images/dpo --scorers tiny-b     folders of images, ours or anybody's
    python -m dpo.evaluate BASE runs/a,runs/b,runs/c ...               three training seeds of one method
    python -m dpo.evaluate --scorers help                              which scorers there are

The first model or folder is the base, which the others are compared with. Each is drawn as python -m dpo.sample draws it; what
was drawn and scored is kept in the output folder, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.common import command
from dpo.common.errors import UserError

RUNS = Path("runs")
EMBEDDED = "embedded"
WORLD = ("--prompts", "embedded", "--first", "160", "--same-noise", "--sampler", "ddim", "--steps", "20", "--guidance", "3")
JUDGES = ["tiny-b", "tiny-b-faithful"]

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when there is a result, 2 after a mistake of the user's, 130 when interrupted."""
    return command.run("dpo.evaluate", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)

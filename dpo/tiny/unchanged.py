"""The unchanged model's pictures of the prompts that a run is judged by, which come with the package.

Half of what a run's judge draws is the same every time. Where the protocol that asks for it is the one of these
pictures in all but the versions of libraries, and the first of them, drawn again, come out alike, they are taken;
else they are drawn. `making/unchanged.py` makes them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dpo.common.files import write_text, write_whole
from dpo.drawing import images
from dpo.drawing.protocol import Protocol
from dpo.drawing.render import Task, ready, render
from dpo.tiny.paths import ASSETS

if TYPE_CHECKING:
    from dpo.drawing.draw import Pipeline

PICTURES, PROTOCOL = ASSETS / "unchanged.png", ASSETS / "unchanged.json"
COLUMNS = 16  # of the one picture that holds all
CHECKED = 4  # drawn again before all are taken
LEVELS = 4  # of 255: other processors and libraries round a pixel by one; another sampler is off by tens

log = logging.getLogger("dpo")


def protocol() -> Protocol:
    """How the pictures were drawn."""
    return Protocol.from_json(json.loads(PROTOCOL.read_text("utf-8")))


def pictures() -> list[Image.Image]:
    """All of them, in the order of the prompts."""
    known = protocol()
    width, height = known.width, known.height
    with Image.open(PICTURES) as sheet:
        whole = sheet.convert("RGB")
    corners = [(n % COLUMNS * width, n // COLUMNS * height) for n in range(int(known.prompts["count"]))]
    return [whole.crop((x, y, x + width, y + height)) for x, y in corners]


def are_from(said: Mapping[str, Any] | None) -> bool:
    """Whether a set's protocol is that of these pictures."""
    return said is not None and dict(said) == protocol().to_json()


def laid_out(pipe: Pipeline, tasks: Sequence[Task], asked: Protocol, folder: Path, device: torch.device) -> bool:
    """Whether the set of `asked` is in `folder` without drawing it: these pictures, put there now or by an earlier call.

    Logs why not where they are not `asked` for, unless they could not be: on a GPU, or a trained model. Raises UserError
    where the disk is full.
    """
    own = protocol()
    differ = [name for name in own.differs(asked) if not name.startswith("versions.")]
    if set(differ) & {"model", "device", "prompts.hash"}:
        return False
    if differ:
        what = f"{differ[0]}: {own.told(differ[0])} there, {asked.told(differ[0])} now"
        log.info("the package's own pictures of the unchanged model are of another protocol (%s): drawing", what)
        return False
    if (there := images.read_protocol(folder)) is not None:
        if there[0] != own:  # drawn here
            return False
        if images.complete(folder):
            return True
    kept = pictures()
    if (off := _largest_difference(pipe, tasks, own, kept, device)) > LEVELS:
        log.warning(
            "the package's own pictures of the unchanged model come out otherwise here (by %d of 255 levels): drawing",
            off,
        )
        return False
    images.write_set(folder, tasks, kept, own)
    libraries = ", ".join(f"{name} {number}" for name, number in own.versions.items())
    log.info(
        "%s: %d pictures of the unchanged model that come with the package, drawn with %s; the first %d, drawn again, are "
        "within %d of 255 levels",
        folder, len(tasks), libraries, CHECKED, off,
    )  # fmt: skip
    return True


def _largest_difference(
    pipe: Pipeline, tasks: Sequence[Task], own: Protocol, kept: Sequence[Image.Image], device: torch.device
) -> int:
    """Levels by which the first pictures differ from what `pipe` draws."""
    with ready(pipe, device, own):
        drawn = render(pipe, tasks[:CHECKED], own)
    pairs = zip(drawn, kept, strict=False)  # there are more of these
    return max(int(np.abs(np.asarray(one.image, np.int16) - np.asarray(other)).max()) for one, other in pairs)


def pack(folder: Path, png: Path, about: Path) -> None:
    """Writes the set of images in `folder` as one picture and its protocol. Raises UserError where some are missing."""
    drawn, known = images.read_set(folder), images.read_protocol(folder)
    assert known is not None, "it was just read"
    width, height = known[0].width, known[0].height
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(drawn) // COLUMNS) * height))
    for one in drawn:
        with Image.open(one.path) as image:
            sheet.paste(image, (one.index % COLUMNS * width, one.index // COLUMNS * height))
    write_whole(png, lambda part: sheet.save(part, format="PNG", optimize=True))
    write_text(about, json.dumps(known[0].to_json(), indent=1) + "\n")

"""A set of images in a folder: drawn in fixed groups, resumed after a kill, and read back.

    FOLDER/protocol.json             the protocol, its hash, and how many images there are
    FOLDER/images/000012-3f9a.png    number and hash; a text chunk says prompt, seed, index, protocol and the pixels' hash

Rounding depends on what is drawn together. So images come in groups by index, and a group of which an image is missing,
broken or of something else is drawn again whole: the same bytes, however often drawing was interrupted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin

from dpo.common.errors import UserError
from dpo.common.files import AGAIN, make_folder, write_text, write_whole, writing
from dpo.common.pictures import pixel_hash
from dpo.common.words import counted_of, digest, first_line, is_unicode, listed
from dpo.drawing.draw import side_by_side
from dpo.drawing.protocol import Protocol
from dpo.drawing.render import Rendered, Task, ready, render

if TYPE_CHECKING:
    from dpo.drawing.draw import Pipeline

CHUNK = "dpo"  # the keyword of the text chunk
PROTOCOL, IMAGES = "protocol.json", "images"

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Drawn:
    """An image of a set on disk."""

    path: Path
    prompt: str
    seed: int  # of its generator
    index: int
    hash: str  # of its pixels and size
    number: int = 0  # of its seed, as a person counts
    category: str = ""
    strength: float | None = None
    layout: int = 0
    fault: str = ""  # "flat" or "not finite"


class Pace(NamedTuple):
    """How drawing goes."""

    done: int  # images of this process that are there
    total: int  # images of this process
    drawn: int  # of those, drawn now
    seconds: float  # for those
    unet: float  # seconds of those in the UNet, where groups are drawn side by side the mean of them

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.drawn / self.seconds if self.seconds else 0.0

    @property
    def outside(self) -> float:
        """Share of the time outside the UNet."""
        return max(0.0, 1 - self.unet / self.seconds) if self.seconds else 0.0


def place(folder: Path, task: Task, protocol: Protocol) -> Path:
    """Where the image of a task lies. A prompt is never part of a name."""
    name = digest(protocol.hash, str(task.seed), task.prompt)[:8]
    return folder / IMAGES / f"{task.index:06d}-{name}.png"


def draw_set(
    pipe: Pipeline,
    tasks: Sequence[Task],
    protocol: Protocol,
    folder: Path,
    *,
    device: torch.device,
    layouts: Sequence[Image.Image] = (),
    shard: tuple[int, int] = (0, 1),
    told: Callable[[Pace], None] = lambda pace: None,
) -> Pace:
    """Draws the images of `tasks`, whose indices are 0..N-1, that are not there yet; the caller holds the folder.

    shard: this process of so many, each of which draws every so many-th group. told: called before the first group and after each. Raises
    UserError where the folder holds images of another protocol, or the disk is full.
    """
    _begin(folder, protocol, len(tasks))
    size = protocol.group
    groups = [tasks[at : at + size] for at in range(0, len(tasks), size)][shard[0] :: shard[1]]
    _sweep(folder, {place(folder, task, protocol).name for group in groups for task in group})
    left = [group for group in groups if not _whole(folder, group, protocol)]
    total = sum(map(len, groups))
    pace = Pace(total - sum(map(len, left)), total, 0, 0.0, 0.0)
    if not left:
        return pace
    if pace.done:
        log.info("%s: %s there", folder, counted_of(pace.done, total, "images", "is", "are"))
    with ready(pipe, device, protocol) as watch, side_by_side(pipe, device) as each:
        begun = time.monotonic()
        told(pace)

        def drawn_by(pipe: Pipeline, group: Sequence[Task]) -> list[Rendered]:
            return render(pipe, group, protocol, layouts)

        for group, images in zip(left, each(drawn_by, left), strict=True):
            for task, rendered in zip(group, images, strict=True):
                _write(folder, task, rendered, protocol)
            done, drawn = pace.done + len(group), pace.drawn + len(group)
            pace = Pace(done, total, drawn, time.monotonic() - begun, watch.seconds() / each.count)
            told(pace)
    return pace


def write_set(folder: Path, tasks: Sequence[Task], pictures: Sequence[Image.Image], protocol: Protocol) -> None:
    """Writes pictures that are there already as the set of `tasks`; the caller holds the folder. Raises UserError as `draw_set`."""
    _begin(folder, protocol, len(tasks))
    for task, picture in zip(tasks, pictures, strict=True):
        _write(folder, task, Rendered(picture, ""), protocol)


def read_protocol(folder: Path) -> tuple[Protocol, int] | None:
    """The protocol of a set and how many images belong to it; None where no set is. Raises UserError for a damaged one."""
    path = folder / PROTOCOL
    try:
        found = json.loads(path.read_text("utf-8"))
        protocol, count = Protocol.from_json(found["protocol"]), found["images"]
        if protocol.hash != found["hash"] or type(count) is not int or count < 1:
            raise ValueError("it was changed")
        return protocol, count
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): name another folder, or delete {folder} with all its images"
        ) from error


def read_set(folder: Path) -> list[Drawn]:
    """All images of a set by index, each decoded once to see that it is whole; other files are passed over.

    Raises UserError where no set is, or not all of it.
    """
    known = read_protocol(folder)
    if known is None:
        raise UserError(f"{folder} holds no images with a {PROTOCOL}: draw them with python -m dpo.sample")
    protocol, count = known
    found = {one.index: one for one in _found(folder, protocol)}
    if missing := count - sum(0 <= index < count for index in found):
        first = next(index for index in range(count) if index not in found)
        raise UserError(
            f"{folder}: {counted_of(missing, count, 'images', 'is', 'are')} missing or broken, the first is {first}: the command "
            "that draws them goes on from here"
        )
    return [found[index] for index in range(count)]


def complete(folder: Path) -> bool:
    """Whether every image of a set has its file: what another process writes is whole once it is there."""
    known = read_protocol(folder)
    return known is not None and len({path.name.partition("-")[0] for path in _files(folder)}) >= known[1]


def merge(folder: Path, parts: Sequence[Path]) -> int:
    """Copies the images of `parts`, drawn apart by one protocol, into `folder`; how many. Raises UserError."""
    found = []
    for part in parts:
        known = read_protocol(part)
        if known is None:
            raise UserError(f"--merge {part}: holds no images with a {PROTOCOL}")
        found.append(known)
        first, other = found[0][0], known[0]
        if names := first.differs(other):
            said = f"{names[0]}: {first.told(names[0])} and {other.told(names[0])}"
            raise UserError(
                f"--merge: {parts[0]} and {part} were drawn by different protocols ({said}), so they are no parts of one set"
            )
    _begin(folder, *found[0])
    copied = set()
    for part, (protocol, _) in zip(parts, found, strict=True):
        (folder / IMAGES).mkdir(exist_ok=True)
        _sweep(folder, {path.name for path in _files(part)})
        for one in _found(part, protocol):
            target = folder / IMAGES / one.path.name
            with writing(target, AGAIN):
                write_whole(target, partial(shutil.copyfile, one.path))
            copied.add(one.path.name)
    return len(copied)


def faults(images: Sequence[Drawn]) -> list[str]:
    """Lines that name the images with a fault, one for each kind."""
    kinds = {one.fault: [each.path.name for each in images if each.fault == one.fault] for one in images if one.fault}
    return [
        f"{counted_of(len(names), len(images), 'images', 'is', 'are')} {kind}: {listed(names)}"
        for kind, names in kinds.items()
    ]


def _begin(folder: Path, protocol: Protocol, count: int) -> None:
    """Writes the protocol of a new set. Raises UserError where the folder holds another."""
    known = read_protocol(folder)
    if known is None:
        make_folder(folder / IMAGES, "--output")
        write_text(
            folder / PROTOCOL,
            json.dumps({"hash": protocol.hash, "images": count, "protocol": protocol.to_json()}, indent=1),
            AGAIN,
        )
        return
    there, images = known
    if there == protocol and images != count:
        raise UserError(f"{folder / PROTOCOL} was changed: it says {images} images, not {count}; delete it")
    if names := there.differs(protocol):
        first = f"{names[0]}: {there.told(names[0])} there, {protocol.told(names[0])} now"
        more = f", and {listed(names[1:])}" if names[1:] else ""
        raise UserError(f"{folder} holds images of another protocol ({first}{more}): name another folder")


def _sweep(folder: Path, own: Container[str]) -> None:
    """Deletes what a killed process left of the images of these names: those of others may be written just now."""
    for path in (folder / IMAGES).glob(".*.part-*"):
        if path.name[1:].rpartition(".part-")[0] in own:
            with suppress(OSError):
                path.unlink()


def _whole(folder: Path, group: Sequence[Task], protocol: Protocol) -> bool:
    return all(_is(place(folder, task, protocol), task, protocol) for task in group)


def _is(path: Path, task: Task, protocol: Protocol) -> bool:
    said = _read(path)
    return said is not None and {**_said(task, protocol), "pixels": said["pixels"], "fault": said.get("fault", "")} == {
        "fault": "", **said
    }  # fmt: skip


def _said(task: Task, protocol: Protocol) -> dict[str, Any]:
    return {**asdict(task), "protocol": protocol.hash}


def _write(folder: Path, task: Task, rendered: Rendered, protocol: Protocol) -> None:
    """The PNG of a task, in one step. Raises UserError when the disk is full."""
    said = {**_said(task, protocol), "fault": rendered.fault, "pixels": pixel_hash(rendered.image)}
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(said))  # plain ASCII: JSON escapes what a prompt may hold
    path = place(folder, task, protocol)
    with writing(path, AGAIN):
        write_whole(path, lambda part: rendered.image.save(part, format="PNG", pnginfo=info))


def _read(path: Path) -> dict[str, Any] | None:
    """What the chunk of a PNG says; None for a file that is no image of ours, or not as it was written."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            return None
        with Image.open(path, formats=("PNG",)) as image:
            said = json.loads(getattr(image, "text", {})[CHUNK])
            return said if said["pixels"] == pixel_hash(image) and _is_drawn(said) else None
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, RecursionError, Image.DecompressionBombError):
        return None


def _is_drawn(said: dict[str, Any]) -> bool:
    """Whether what a chunk says can be the fields of a Drawn: anybody may have written it."""
    whole, texts = ("index", "seed", "number", "layout"), ("prompt", "category", "fault", "pixels", "protocol")
    return (
        all(type(said.get(name, 0)) is int for name in whole)
        and all(isinstance(said.get(name, ""), str) and is_unicode(said.get(name, "")) for name in texts)
        and isinstance(said.get("strength"), (int, float, type(None)))
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / IMAGES).glob("*.png") if not path.name.startswith("."))


def _found(folder: Path, protocol: Protocol) -> Iterator[Drawn]:
    for path in _files(folder):
        said = _read(path)
        if said is None or said.pop("protocol", None) != protocol.hash:
            continue
        said["hash"] = said.pop("pixels")
        with suppress(TypeError):  # a name that this version does not know
            yield Drawn(path, **said)

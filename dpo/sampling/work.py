"""From what a user asks for to a folder of images: prompts, protocol and tasks; drawing, sheets, benchmark folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpo.common import locks
from dpo.common.command import of_launcher
from dpo.common.console import Progress
from dpo.common.errors import UserError, reading
from dpo.common.files import AGAIN, sweep, writing
from dpo.common.pictures import pixel_hash, upright
from dpo.common.words import digest, listed, multiples, number_of
from dpo.drawing import images, layouts, memory, prompts, sheet
from dpo.drawing.images import Drawn, Pace
from dpo.drawing.prompts import Prompt, PromptSet
from dpo.drawing.protocol import Protocol
from dpo.drawing.render import Task
from dpo.models.ready import pick_device
from dpo.sampling import model as named
from dpo.sampling import samplers
from dpo.tiny import prompts as world
from dpo.tiny import unchanged

log = logging.getLogger("dpo")

EXAMPLES = Path(prompts.__file__).parent / "examples"  # layouts to try SDEdit with
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BASE = "base"  # the folder of the base's images, inside that of the model's
OF_WORLD = {  # prompts of the embedded world by name: which list, and how many of it (None: all)
    (named.EMBEDDED,): ("report", None),
    (f"{named.EMBEDDED}:judged",): ("report", world.JUDGED),
    (f"{named.EMBEDDED}:tuning",): ("tuning", None),
}
MOST = 10_000_000  # images of a set
FINISHING = 600.0  # seconds to wait while another process writes the sheets
VERSIONS = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Asked:
    """What to draw. None: as the model or the device says."""

    model: str
    base: str | None = None  # drawn too, into base/, and shown beside
    lora_base: str | None = None
    prompts: tuple[str, ...] = ()
    prompt_column: str | None = None
    subset: int | None = None
    subset_seed: int = 0
    seeds: int = 1
    first_seed: int = 0
    same_noise: bool = False
    sampler: str = samplers.OWN
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    batch: int | None = None
    precision: str = "auto"
    vae_tile: int = 0
    text_tokens: int | None = None
    few_steps: frozenset[str] = frozenset()  # models that were distilled, whatever their files say
    device: str = "auto"
    init_image: str | None = None
    strength: tuple[float, ...] = ()
    layout: str | None = None
    sheets: int = 12
    cache_dir: str | None = None
    shipped: bool = False  # take pictures that come with the package where they are what would be drawn


@dataclass(frozen=True)
class Layout:
    """An init image for SDEdit, and the prompt that its file's name is."""

    path: Path
    prompt: str


def draw(asked: Asked, folder: Path, shard: tuple[int, int] = (0, 1)) -> list[Drawn]:
    """Draws what is asked into `folder`; all its images, or none where other processes still draw theirs.

    shard: this process of so many. Raises UserError.
    """
    if asked.layout is not None and asked.init_image is not None:
        raise UserError(f"--layout {asked.layout} wants images from prompts alone: leave --init-image out")
    init = _layouts(asked)
    chosen = prompts_of(asked, init)
    if asked.layout is not None:
        layouts.check(asked.layout, chosen.prompts, asked.seeds)
    device = device_of(asked.device)
    _check_asked(asked, chosen, init)
    if asked.base is not None:
        asked = alike(asked, [asked.model, asked.base])
    part = "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"
    sets = [(asked.model, folder)] + ([(asked.base, folder / BASE)] if asked.base is not None else [])
    with ExitStack() as stack:
        stack.enter_context(locks.held(folder, "--output", part))
        for name, place in sets:
            drawn = _draw_one(asked, name, place, chosen, init, device, shard)
            own = {key: getattr(drawn, key) for key in ("steps", "guidance", "width", "height")}
            asked = replace(asked, **own)  # the base is drawn alike, whatever its own defaults
        if not all(images.complete(place) for _, place in sets):
            log.info("%s: this process has drawn its part; the last one writes the sheets", folder)
            return []
        with locks.held(folder, "--output", "-sheets", FINISHING):  # two processes may find all images there
            with writing(folder, AGAIN):
                return _finish(asked, folder, chosen, asked.base is not None)


def alike(asked: Asked, names: Sequence[str]) -> Asked:
    """`asked` with what the runs among the models `names` were trained with: captions of one length, and few steps.

    Raises UserError.
    """
    places = names, asked.lora_base, asked.cache_dir
    tokens = named.captions_alike(*places) if asked.text_tokens is None else asked.text_tokens
    return replace(asked, text_tokens=tokens, few_steps=named.few_steps(*places))


def _check_asked(asked: Asked, chosen: PromptSet, init: Sequence[Layout]) -> None:
    """Raises UserError for what can be known to fail before hours of drawing."""
    if not named.check(asked.model, asked.lora_base, asked.cache_dir) and asked.lora_base is not None:
        raise UserError(f"--lora-base {asked.lora_base}: {asked.model} is a whole model, no LoRA; leave it out")
    if asked.base is not None:
        named.check(asked.base, cache_dir=asked.cache_dir)
    count = len(chosen.prompts) * asked.seeds * max(1, len(asked.strength)) * max(1, len(init) if asked.prompts else 1)
    if count > MOST:
        raise UserError(
            f"{count:,} images are asked for, and {MOST:,} are the most of one set: fewer --seeds or --prompts"
        )
    last = max(prompt.seed for prompt in chosen.prompts) + asked.first_seed + asked.seeds - 1
    if last >= prompts.SEEDS:
        raise UserError(
            f"the last seed would be {last}, and 2^32 - 1 is the largest: a lower --first-seed, or fewer --seeds"
        )


def merge(folder: Path, parts: Sequence[Path], asked: Asked) -> list[Drawn]:
    """Joins what was drawn apart, with --shard on machines without a common disk; writes sheets, and the benchmark folder.

    asked: how many sheets, and a layout with the prompts that were drawn. Raises UserError where the parts differ in their
    protocol or were drawn from other prompts, or images are missing.
    """
    chosen = prompts_of(asked, ()) if asked.layout is not None else None
    with_base = any((part / BASE).is_dir() for part in parts)
    with locks.held(folder, "--output"):
        count = images.merge(folder, parts)
        if with_base:
            count += images.merge(folder / BASE, [part / BASE for part in parts])
        log.info("%s: %s of %s", folder, number_of(count, "images"), number_of(len(parts), "parts"))
        if chosen is not None and asked.layout is not None and (known := images.read_protocol(folder)) is not None:
            protocol, total = known
            if dict(protocol.prompts) != chosen.about:
                raise UserError(f"--prompts: the images of {folder} were drawn from others; name those, as then")
            layouts.check(asked.layout, chosen.prompts, total // len(chosen.prompts))
        with writing(folder, AGAIN):
            return _finish(asked, folder, chosen, with_base)


def _finish(asked: Asked, folder: Path, chosen: PromptSet | None, with_base: bool) -> list[Drawn]:
    """Sheets and benchmark folder of images that are all there, whose faults it names; the images."""
    drawn = _shown(folder, with_base, asked.sheets)
    if chosen is not None and asked.layout is not None:
        log.info("%s: %s", asked.layout, layouts.lay_out(asked.layout, drawn, chosen.prompts, folder))
    return drawn


def _shown(folder: Path, with_base: bool, sheets: int) -> list[Drawn]:
    """The images of a set that is all there, its faults named, on at most so many sheets, with the base's beside."""
    drawn = images.read_set(folder)
    sets = {"base": images.read_set(folder / BASE), "aligned": drawn} if with_base else {"image": drawn}
    for place in (folder, folder / BASE):
        sweep(place, images.PROTOCOL)  # all images are there: nobody writes one any more
    sweep(folder / sheet.SHEETS)
    for each in sets.values():
        for line in images.faults(each):
            log.warning("%s", line)
    if paths := sheet.write_sheets(folder, sets, sheets):
        log.info("contact sheets: %d in %s", len(paths), paths[0].parent)
    return drawn


def image_seed(number: int, prompt: str, same_noise: bool) -> int:
    """The seed of an image's generator: a hash of number and prompt, or the number itself.

    32 bits: torch's CPU generator reads no more of a seed.
    """
    return number if same_noise else int(digest(str(number), prompt)[:8], 16)


def tasks_of(asked: Asked, chosen: PromptSet, init: Sequence[Layout]) -> list[Task]:
    """Every image by its index: prompt by prompt, of each the layouts, of each the strengths, of each the seeds."""
    pairs = [(prompt, place) for prompt in chosen.prompts for place in range(max(1, len(init)))]
    if init and not asked.prompts:
        pairs = list(zip(chosen.prompts, range(len(init)), strict=True))  # each layout has its own prompt
    tasks: list[Task] = []
    for prompt, place in pairs:
        for strength in asked.strength or (None,):
            for number in range(asked.first_seed, asked.first_seed + asked.seeds):
                own = prompt.seed + number
                seed = image_seed(own, prompt.text, asked.same_noise)
                tasks.append(Task(len(tasks), prompt.text, seed, number, prompt.category, strength, place))
    return tasks


def _draw_one(
    asked: Asked,
    name: str,
    folder: Path,
    chosen: PromptSet,
    init: Sequence[Layout],
    device: torch.device,
    shard: tuple[int, int],
) -> Protocol:
    precision = "fp32" if asked.precision == "auto" and device.type == "cpu" else asked.precision
    own = asked.lora_base if name == asked.model else None
    opened = named.opened(
        name,
        device=device,
        precision=precision,
        lora_base=own,
        cache_dir=asked.cache_dir,
        text_tokens=asked.text_tokens,
        few_steps=name in asked.few_steps,
    )
    samplers.use(opened.pipe, asked.sampler)
    width, height = asked.width or opened.side, asked.height or opened.side
    for flag, side in (("--width", width), ("--height", height)):
        if side % opened.side_factor:
            raise UserError(f"{flag} {side}: {name} draws sides that are {multiples(opened.side_factor, side)}")
        if side > (opened.largest or side):
            raise UserError(f"{flag} {side}: {name} draws sides of {opened.largest} pixels at most")
    steps = asked.steps or opened.steps
    guidance = opened.guidance if asked.guidance is None else asked.guidance
    if steps > (most := int(opened.pipe.scheduler.config.get("num_train_timesteps", steps))):
        raise UserError(f"--steps {steps}: the model knows {most} timesteps, so that many steps are the most")
    for strength in asked.strength:
        if int(steps * strength) < 1:
            raise UserError(f"--strength {strength:g} of {steps} steps is no step at all: give more of either")
    pixels = [_picture(layout.path, (width, height)) for layout in init]
    protocol = Protocol(
        model=opened.fingerprint,
        prompts=chosen.about,
        seeds=tuple(range(asked.first_seed, asked.first_seed + asked.seeds)),
        same_noise=asked.same_noise,
        sampler=type(opened.pipe.scheduler).__name__,
        sampler_settings=samplers.settings(opened.pipe),
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        group=asked.batch or memory.group_for(opened.pipe, device, width, height, guidance > 1),
        precision=opened.precision,
        vae_precision=opened.vae_precision,
        vae_tile=asked.vae_tile,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions={library: version(library) for library in VERSIONS},
        strengths=asked.strength,
        init_images=tuple(map(pixel_hash, pixels)),
        text_tokens=opened.text_tokens,
    )
    log.info(
        "%s: %s, %s, guidance %g, %d x %d, %s%s, %d together, on %s; %s of %s",
        name, protocol.sampler, number_of(steps, "steps"), protocol.guidance, width, height, protocol.precision,
        f", captions of {number_of(opened.text_tokens, 'tokens')}" if opened.text_tokens else "", protocol.group, protocol.device,
        number_of(len(chosen.prompts), "prompts"), chosen.name,
    )  # fmt: skip
    tasks = tasks_of(asked, chosen, init)
    if asked.shipped and shard == (0, 1) and unchanged.laid_out(opened.pipe, tasks, protocol, folder, device):
        return protocol
    with ExitStack() as stack:
        bars: list[Progress] = []

        def told(pace: Pace) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(pace.total, _fields, pace.done, 1, unit="image")))
            bars[0].update(pace.done, {"pace": pace})

        pace = images.draw_set(
            opened.pipe, tasks, protocol, folder, device=device, layouts=pixels, shard=shard, told=told
        )
    if not pace.drawn:
        log.info("%s: %s there", folder, "the image was" if pace.total == 1 else f"all {pace.total} images were")
    else:
        log.info(
            "%s: %s drawn, %.3g images/s, %.0f %% of the time outside the denoiser",
            folder, number_of(pace.drawn, "images"), pace.rate, 100 * pace.outside,
        )  # fmt: skip
    return protocol


def _fields(metrics: Mapping[str, Any]) -> list[str]:
    return [f"{metrics['pace'].rate:.3g} images/s"]


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" under torchrun is the GPU of this process."""
    if name == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{of_launcher('LOCAL_RANK', 0)}"
    return pick_device(name)


def prompts_of(asked: Asked, init: Sequence[Layout]) -> PromptSet:
    """The prompts that are asked for. Raises UserError."""
    if not asked.prompts and init:
        if asked.subset is not None:
            raise UserError("--subset chooses among --prompts: give those, or fewer layouts")
        found = PromptSet("the layouts' names", tuple(Prompt(layout.prompt) for layout in init))
    elif (name := asked.prompts or ((named.EMBEDDED,) if asked.model == named.EMBEDDED else ())) in OF_WORLD:
        kind, count = OF_WORLD[name]
        rows = world.prompts(kind)
        pairs = list(zip(rows.captions, rows.seeds, strict=True))[:count]
        found = PromptSet(f"{name[0]}, {kind}", tuple(Prompt(text, seed=seed) for text, seed in pairs))
    elif asked.prompts:
        found = prompts.opened(asked.prompts, asked.prompt_column, [name for (name,) in OF_WORLD])
    else:
        raise UserError(
            f"no prompts: give --prompts with texts, a file, or a name: {listed([*prompts.NAMES, named.EMBEDDED])}"
        )
    if asked.subset is None and asked.subset_seed:
        raise UserError("--subset-seed chooses another --subset: give that too, or leave it out")
    return found if asked.subset is None else found.subset(asked.subset, asked.subset_seed)


def _layouts(asked: Asked) -> list[Layout]:
    """The init images of --init-image: a file, all of a folder, or the examples. Raises UserError."""
    if asked.init_image is None:
        return []
    place = EXAMPLES if asked.init_image == "examples" else Path(asked.init_image).expanduser()
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURES) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise UserError(f"--init-image {asked.init_image}: no such image, and no folder of images; or say examples")
    return [Layout(path, path.stem.replace("-", " ").replace("_", " ")) for path in files]


def _picture(path: Path, size: tuple[int, int]) -> Image.Image:
    """An init image, upright, at the size that is drawn (width, height). Raises UserError for a file that is none."""
    try:
        with reading(str(path), "name an image"), Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
            return upright(opened).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name an image") from error

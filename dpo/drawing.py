"""Sample images for fixed prompts and seeds, policy beside reference, and the PNG grid that shows them.

    pipe = pipeline(components)
    before = sample(pipe, prompts, seeds, steps=50, guidance=7.5)          # pipe.unet is the reference
    pipe.unet = policy
    after = sample(pipe, prompts, seeds, steps=50, guidance=7.5)
    write_grid(folder / "samples/step_000500.png", prompts, seeds, {"before": before, "after": after})

Every image has its own CPU generator, so an image depends on its prompt and seed alone, on any device, and no global generator is
touched. A grid carries its prompts, seeds and layout in a PNG text chunk; `read_grid` cuts it into its images again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dpo.models.family import Components

CHUNK = "dpo-grid"
MARGIN, GAP, SMALLEST, LARGEST = 16, 8, 160, 512
INK, QUIET, PAPER = "#1b1b1f", "#66666e", "#ffffff"


class Cell(NamedTuple):
    """One prompt and seed of a grid: its images by column label, in the grid's order."""

    prompt: str
    seed: int
    images: dict[str, Image.Image]


def pipeline(components: Components, unet: torch.nn.Module | None = None) -> Any:
    """A diffusers pipeline over the loaded modules (no copies), sampling with the model's own scheduler."""
    import diffusers

    family = components.family
    scheduler_class = getattr(diffusers, components.scheduler_config.get("_class_name", "DDIMScheduler"))
    modules = {"unet": components.unet if unet is None else unet, "vae": components.vae}
    modules |= dict(zip(family.tokenizers, components.tokenizers, strict=True))
    modules |= dict(zip((name for name, _ in family.text_encoders), components.text_encoders, strict=True))
    scheduler = scheduler_class.from_config(components.scheduler_config, prediction_type=components.prediction_type)
    extras: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if family.name == "sdxl":
        extras = {"add_watermarker": False, "force_zeros_for_empty_prompt": not components.turbo}
    return getattr(diffusers, family.pipeline)(scheduler=scheduler, **modules, **extras)


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = 4,
    autocast: torch.dtype | None = None,
) -> list[Image.Image]:
    """One image for every prompt and seed, prompt by prompt.

    size: pixels of a side, None for the model's own; batch: images at a time; autocast: the precision the UNet is trained under.
    The modules' devices and modes and the scheduler come back as they were.
    """
    tasks = [(prompt, seed) for prompt in prompts for seed in seeds]
    device = next(pipe.unet.parameters()).device
    context = torch.autocast(device.type, autocast) if autocast is not None else nullcontext()
    images: list[Image.Image] = []
    with _borrowed(pipe, device), context:
        for start in range(0, len(tasks), batch):
            part = tasks[start : start + batch]
            result = pipe(
                [prompt for prompt, _ in part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
                height=size,
                width=size,
            )
            images.extend(result.images)
    return images


def write_grid(path: Path, prompts: Sequence[str], seeds: Sequence[int], columns: Mapping[str, Sequence[Image.Image]]) -> Path:
    """A labelled PNG: one row per prompt, and for each seed the columns side by side (before, after). Replaced in one move.

    columns: label -> images in the order of `sample`.
    """
    sides = {image.size for images in columns.values() for image in images}
    native = max(max(size) for size in sides)
    side = min(max(native, SMALLEST), LARGEST)
    group = len(columns) * side + (len(columns) - 1) * GAP
    width = 2 * MARGIN + len(seeds) * group + (len(seeds) - 1) * 2 * MARGIN
    row_height = 52 + side + MARGIN
    grid = Image.new("RGB", (width, MARGIN + len(prompts) * row_height), PAPER)
    pen = ImageDraw.Draw(grid)
    title, label = ImageFont.load_default(18), ImageFont.load_default(13)
    boxes = []
    for row, prompt in enumerate(prompts):
        top = MARGIN + row * row_height
        pen.text((MARGIN, top), _fitted(pen, prompt, title, width - 2 * MARGIN), INK, title)
        for place, seed in enumerate(seeds):
            for column, (name, images) in enumerate(columns.items()):
                left = MARGIN + place * (group + 2 * MARGIN) + column * (side + GAP)
                image = images[row * len(seeds) + place].convert("RGB")
                method = Image.Resampling.NEAREST if side > max(image.size) else Image.Resampling.LANCZOS
                grid.paste(image.resize((side, side), method), (left, top + 52))
                pen.text((left, top + 30), _fitted(pen, f"{name} · seed {seed}", label, side), QUIET, label)
                boxes.append([row, seed, name, left, top + 52, side])
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps({"prompts": list(prompts), "boxes": boxes}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    grid.save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)
    return path


def read_grid(path: Path) -> list[Cell]:
    """The images of a grid by prompt and seed; empty for a PNG that `write_grid` did not make."""
    with Image.open(path) as opened:
        text = getattr(opened, "text", {}).get(CHUNK)
        if text is None:
            return []
        layout = json.loads(text)
        picture = opened.convert("RGB")
    cells: dict[tuple[int, int], Cell] = {}
    for row, seed, name, left, top, side in layout["boxes"]:
        cell = cells.setdefault((row, seed), Cell(layout["prompts"][row], seed, {}))
        cell.images[name] = picture.crop((left, top, left + side, top + side))
    return list(cells.values())


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """The text, cut with an ellipsis so that it is at most `width` pixels wide."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


@contextmanager
def _borrowed(pipe: Any, device: torch.device) -> Iterator[None]:
    """All modules on `device` in eval mode, a fresh scheduler, no progress bar; everything as before afterwards."""
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    places = [(module, next(module.parameters()).device) for module in modules]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    try:
        for module in modules:
            module.to(device).eval()
        yield
    finally:
        for module, place in places:
            module.to(place)
        for part, training in modes:
            part.training = training
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)

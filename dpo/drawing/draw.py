"""Sample images for fixed prompts and seeds.

Every image has its own CPU generator, so an image depends on its prompt and seed alone, on any device, and no global generator is
touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image


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

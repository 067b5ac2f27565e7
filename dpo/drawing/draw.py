"""Sample images for fixed prompts and seeds.

Every image has its own CPU generator, so an image depends on its prompt and seed alone, on any device, and no global
generator is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"

BATCH = 4  # images at a time
TILE = 512  # pixels of a side that the VAE decodes at once where memory is short


@torch.no_grad()
def sample(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    device: torch.device | str,
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = BATCH,
    autocast: torch.dtype | None = None,
    frugal: bool = False,
) -> list[Image.Image]:
    """One image for every prompt and seed, prompt by prompt.

    device: where all modules run; steps: sampling steps; guidance: guidance scale; size: pixels of a side, None for the
    model's own; batch: images at a time; autocast: the precision that the policy is trained under; frugal: decode one
    image at a time, and one larger than TILE in tiles (which meet in a blend: the image differs slightly), and keep no
    casts of the weights. The modules' devices and modes and the pipeline's scheduler are restored afterwards.
    """
    tasks = [(prompt, seed) for prompt in prompts for seed in seeds]
    device = torch.device(device)
    context = torch.autocast(device.type, autocast, cache_enabled=not frugal) if autocast else nullcontext()
    images: list[Image.Image] = []
    with borrowed(pipe, device), tiled(pipe.vae, TILE if frugal else 0), context:
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
def tiled(vae: AutoencoderKL, side: int) -> Iterator[None]:
    """Inside the block `vae` decodes one image at a time, in tiles of at most `side` pixels; 0: as it is set."""
    if not side:
        yield
        return
    names = ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    vae.enable_slicing()
    vae.enable_tiling()
    if vae.tile_sample_min_size > side:
        vae.tile_latent_min_size = vae.tile_latent_min_size * side // vae.tile_sample_min_size
        vae.tile_sample_min_size = side
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def borrowed(pipe: Pipeline, device: torch.device) -> Iterator[None]:
    """Inside the block: all modules on `device` in eval mode, a fresh scheduler, no progress bar.

    Restored at its end.
    """
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

"""Sample images for fixed prompts and seeds.

Every image has its own CPU generator, so an image depends on its prompt and seed alone, on any device, and no global
generator is touched.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from PIL import Image

from dpo.common.cores import SMALL
from dpo.common.libraries import CAPTIONS

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"

BATCH = 4  # images at a time
TILE = 512  # pixels of a side that the VAE decodes at once where memory is short
SIZES = ("tile_sample_", "tile_latent_")  # of a VAE's tiles, strides and overlaps, how its fields' names begin
OF_TILES = ("use_slicing", "use_tiling", *SIZES)

Group = TypeVar("Group")
Made = TypeVar("Made")


@torch.no_grad()
def sample(
    pipe: Pipeline,
    tasks: Sequence[tuple[str, int]],
    *,
    device: torch.device | str,
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = BATCH,
    autocast: torch.dtype | None = None,
    frugal: bool = False,
    told: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """One image for each prompt and its seed.

    device: where all modules run; steps: sampling steps; guidance: guidance scale; size: pixels of a side, None for the
    model's own; batch: images at a time; autocast: the precision that the policy is trained under; frugal: decode one
    image at a time, and one larger than TILE in tiles (which meet in a blend: the image differs slightly), and keep no
    casts of the weights; told: hears how many images are drawn, after each group. The modules' devices and modes and
    the pipeline's scheduler are restored afterwards.
    """
    device = torch.device(device)
    told_pipe = asked_of(pipe, guidance)

    @torch.no_grad()  # here too: both are settings of a thread
    def together(pipe: Pipeline, part: Sequence[tuple[str, int]]) -> list[Image.Image]:
        with torch.autocast(device.type, autocast, cache_enabled=not frugal) if autocast else nullcontext():
            return pipe(
                prompt=[prompt for prompt, _ in part],
                num_inference_steps=steps,
                **told_pipe,
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
                height=size,
                width=size,
            ).images

    groups = [tasks[start : start + batch] for start in range(0, len(tasks), batch)]
    with borrowed(pipe, device), tiled(pipe.vae, TILE if frugal else 0), side_by_side(pipe, device) as each:
        drawn: list[Image.Image] = []
        for images in each(together, groups):
            drawn += images
            told(len(drawn))
        return drawn


def network(pipe: Pipeline) -> Any:
    """The denoiser of a pipeline: a UNet or a transformer."""
    found = pipe.components.get("unet", pipe.components.get("transformer"))
    assert isinstance(found, torch.nn.Module), "every family's pipeline has one"
    return found


def asked_of(pipe: Pipeline, guidance: float) -> dict[str, Any]:
    """The arguments of a call of `pipe` that ask for a guidance scale, and for captions as in training.

    Qwen-Image's pipeline is guided by another argument, and only where it is given a negative prompt.
    """
    lengths: dict[str, Any] = getattr(pipe, CAPTIONS, {})
    if "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters and not hasattr(pipe, "tokenizer_2"):
        return lengths | {"true_cfg_scale": guidance, "negative_prompt": " "}
    return lengths | {"guidance_scale": guidance}


class Hands:
    """How many groups of images are drawn at the same time, and by whom."""

    def __init__(self, pipe: Pipeline, count: int, pool: ThreadPoolExecutor | None, own: threading.local) -> None:
        self._pipe, self._pool, self._own, self.count = pipe, pool, own, count

    def __call__(self, work: Callable[[Pipeline, Group], Made], groups: Iterable[Group]) -> Iterator[Made]:
        """work(pipe, group) of each group, in order."""
        if self._pool is None:
            return (work(self._pipe, group) for group in groups)
        return self._pool.map(lambda group: work(self._own.pipe, group), groups)


@contextmanager
def side_by_side(pipe: Pipeline, device: torch.device) -> Iterator[Hands]:
    """Inside the block, a way to draw groups: one after another, or on a CPU, with a small UNet, each on a core of its own.

    That is 1.5 times as fast there as all cores on one group, and what a group gives does not depend on how many cores
    there are.
    """
    cores = torch.get_num_threads()
    own = threading.local()
    if device.type != "cpu" or cores == 1 or sum(p.numel() for p in network(pipe).parameters()) > SMALL:
        yield Hands(pipe, 1, None, own)
        return

    def start() -> None:
        torch.set_num_threads(1)
        own.pipe = _alike(pipe)

    pool = ThreadPoolExecutor(cores, initializer=start)
    try:
        yield Hands(pipe, cores, pool, own)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _alike(pipe: Pipeline) -> Pipeline:
    """A pipeline over the same modules whose sampler and tokenizers, which keep state, are its own."""
    made = copy.copy(pipe)
    for name, part in pipe.components.items():
        if part is not None and not isinstance(part, torch.nn.Module):
            setattr(made, name, copy.deepcopy(part))
    return made


@contextmanager
def tiled(vae: AutoencoderKL, side: int) -> Iterator[None]:
    """Inside the block `vae` decodes one image at a time, in tiles of at most `side` pixels; 0: as it is set."""
    if not side:
        yield
        return
    before = {name: value for name, value in vars(vae).items() if name.startswith(OF_TILES)}
    vae.enable_slicing()
    vae.enable_tiling()
    height = before.get("tile_sample_min_height", side)  # Qwen-Image's VAE names both sides
    own = before.get("tile_sample_min_size", height)
    for name, value in before.items():
        if name.startswith(SIZES):
            setattr(vae, name, value * side // own)
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

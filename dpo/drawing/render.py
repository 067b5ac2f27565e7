"""One group of images by a diffusers pipeline: the same pixels as plain diffusers gives, up to rounding.

Every image has its own CPU generator, handed over as diffusers' list, so that the noise of ancestral samplers' steps is
its own too. The VAE decodes one image at a time.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpo.common.errors import UserError
from dpo.drawing import draw
from dpo.drawing.protocol import Protocol

if TYPE_CHECKING:
    from dpo.drawing.draw import Pipeline

FLAT = 2  # grey levels: an image with no more between its darkest and brightest pixel shows nothing


@dataclass(frozen=True)
class Task:
    """One image to draw."""

    index: int  # in the set
    prompt: str
    seed: int  # of its generator
    number: int = 0  # of the seed, as a person counts
    category: str = ""
    strength: float | None = None  # of SDEdit
    layout: int = 0  # which init image


class Rendered(NamedTuple):
    """An image, and what is wrong with it: "flat", "not finite" or nothing."""

    image: Image.Image
    fault: str


class Stopwatch:
    """Seconds that a module's forward passes take, summed over threads; a GPU is asked only when the sum is read."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device, self._total = device, 0.0
        self._own, self._ended = threading.local(), queue.SimpleQueue[tuple[Any, Any]]()
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._begin()),
            module.register_forward_hook(lambda *_: self._end()),
        ]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self) -> None:
        self._own.begun = self._now()

    def _end(self) -> None:
        self._ended.put((self._own.begun, self._now()))

    def seconds(self) -> float:
        """All so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        while not self._ended.empty():
            begun, ended = self._ended.get()
            self._total += begun.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - begun
        return self._total

    def stop(self) -> None:
        """Takes its hooks off the module."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def ready(pipe: Pipeline, device: torch.device, protocol: Protocol) -> Iterator[Stopwatch]:
    """Inside the block `pipe` is on `device`, and its VAE decodes in the protocol's tiles; yields the UNet's stopwatch."""
    with draw.borrowed(pipe, device), draw.tiled(pipe.vae, protocol.vae_tile):
        watch = Stopwatch(draw.network(pipe), device)
        try:
            yield watch
        finally:
            watch.stop()


@torch.inference_mode()
def render(
    pipe: Pipeline, tasks: Sequence[Task], protocol: Protocol, layouts: Sequence[Image.Image] = ()
) -> list[Rendered]:
    """The images of `tasks`, drawn together; with SDEdit those of one strength together.

    layouts: the init images, of the protocol's size.
    """
    if "transformer" in pipe.components:
        return _of_flow(pipe, tasks, protocol)
    found: list[Rendered] = []
    for strength, part in groupby(tasks, key=lambda task: task.strength):
        latents_BCHW = _latents(pipe, list(part), strength, protocol, layouts)
        found += [_seen(pipe, one) for one in latents_BCHW.split(1)]
    return found


def _of_flow(pipe: Pipeline, tasks: Sequence[Task], protocol: Protocol) -> list[Rendered]:
    """Of a pipeline whose latents only itself can unpack. Raises UserError for tasks that begin with an image."""
    if any(task.strength is not None for task in tasks):
        raise UserError(f"images drawn over a layout are for Stable Diffusion and SDXL, not {type(pipe).__name__}")
    pipe = copy.copy(pipe)
    pipe.image_processor = seen = _Decoded(pipe.image_processor)
    pixels_B3HW = pipe(
        prompt=[task.prompt for task in tasks],
        num_inference_steps=protocol.steps,
        **draw.asked_of(pipe, protocol.guidance),
        generator=[torch.Generator("cpu").manual_seed(task.seed) for task in tasks],
        height=protocol.height,
        width=protocol.width,
        output_type="pt",
    ).images
    return [
        _rendered(one.permute(1, 2, 0).float().cpu().numpy(), decoded)
        for one, decoded in zip(pixels_B3HW, seen.decoded, strict=True)
    ]


class _Decoded:
    """A pipeline's image processor that keeps what it was given: once clamped, infinities look like white and black."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.decoded = inner, torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def postprocess(self, image: Tensor, *arguments: Any, **options: Any) -> Any:
        self.decoded = image
        return self._inner.postprocess(image, *arguments, **options)


def _rendered(pixels_HW3: np.ndarray, decoded: Tensor) -> Rendered:
    """Pixels in [0, 1] as an image of 8 bits, rounded as diffusers does it; decoded: what is to be finite."""
    finite = bool(torch.isfinite(decoded).all())
    levels = (np.nan_to_num(pixels_HW3) * 255).round().astype(np.uint8)
    flat = int(np.ptp(levels.reshape(-1, 3), axis=0).max()) <= FLAT
    return Rendered(Image.fromarray(levels), "not finite" if not finite else "flat" if flat else "")


def _latents(
    pipe: Pipeline, tasks: list[Task], strength: float | None, protocol: Protocol, layouts: Sequence[Image.Image]
) -> Tensor:
    generators = [torch.Generator("cpu").manual_seed(task.seed) for task in tasks]
    asked: dict[str, Any] = {
        "prompt": [task.prompt for task in tasks],
        "num_inference_steps": protocol.steps,
        "guidance_scale": protocol.guidance,
        "generator": generators,
        "output_type": "latent",
    }
    if strength is None:
        return pipe(**asked, height=protocol.height, width=protocol.width).images
    drawn = [_encoded(pipe, layouts[task.layout], generator) for task, generator in zip(tasks, generators, strict=True)]
    return _from_image(pipe)(**asked, image=torch.cat(drawn), strength=strength).images


def _from_image(pipe: Pipeline) -> Any:
    """diffusers' image-to-image pipeline over the same modules."""
    import diffusers

    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline"))
    xl = "XL" in kind.__name__
    options = {"add_watermarker": False} if xl else {"requires_safety_checker": False}
    if xl:
        options["force_zeros_for_empty_prompt"] = pipe.config["force_zeros_for_empty_prompt"]
    made = kind(**pipe.components, **options)
    made.set_progress_bar_config(disable=True)
    return made


def _encoded(pipe: Pipeline, layout: Image.Image, generator: torch.Generator) -> Tensor:
    """Scaled latents [1, C, h, w] of an init image, drawn from the VAE's posterior as diffusers does it."""
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(layout).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.sample(generator)
    mean, std = _normal(vae, latents)
    return ((latents - mean) * vae.config["scaling_factor"] / std).to(next(draw.network(pipe).parameters()).dtype)


def _normal(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the latents by channel [1, C, 1, 1], where the VAE's config states them; else 0 and 1."""
    stated = [vae.config.get(name) for name in ("latents_mean", "latents_std")]
    if None in stated:
        return like.new_zeros(1), like.new_ones(1)
    mean, std = (like.new_tensor(one).view(1, -1, 1, 1) for one in stated)
    return mean, std


def _seen(pipe: Pipeline, latents_1CHW: Tensor) -> Rendered:
    """Latents as an image of 8 bits, rounded as diffusers does it."""
    vae = pipe.vae
    latents = latents_1CHW.to(vae.dtype)
    mean, std = _normal(vae, latents)
    decoded = vae.decode(latents * std / vae.config["scaling_factor"] + mean, return_dict=False)[0]
    # the decoder's own output is looked at: diffusers cuts to [0, 1]
    return _rendered(pipe.image_processor.postprocess(decoded, output_type="np")[0], decoded)

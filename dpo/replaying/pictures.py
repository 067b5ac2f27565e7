"""The images of a pair of an update, as the run saw them."""

from __future__ import annotations

from contextlib import closing

import torch
from PIL import Image

from dpo.data import loader
from dpo.data.batch import Decoding
from dpo.data.loader import Reading
from dpo.data.order import Place
from dpo.data.pairs import ImageRef
from dpo.data.store import reader
from dpo.data.store.store import of_store
from dpo.pages.replay import SIDES
from dpo.replaying.pairs import OnePair
from dpo.training.run import Run


def pictures(run: Run, pair: OnePair) -> list[Image.Image]:
    """Win and lose of a pair of the run's source, or the image alone, cropped and mirrored as in that update.

    Black where one is unusable.

    Those of a prepared store are what the VAE makes of the latents it holds.
    """
    at = pair.place.indices.index(pair.index)
    only = Place(pair.place.position + at, [pair.index], [pair.place.epochs[at]], size=pair.place.size)
    decoding, store = Decoding.of(run.config.data, run.config.runtime.seed), of_store(run.source)
    if store is not None:
        stream = reader.read(store, [only], decoding)
    else:
        stream = loader.load(run.source, [only], decoding, Reading(bad_image_limit=1.0), 1)
    with closing(stream):
        batch = next(stream)
    pixels = batch.pixels
    if pixels is None:
        assert batch.latent_mean is not None, "images, or what a store has of them"
        pixels = _decoded(run, batch.latent_mean)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def places(run: Run, pair: OnePair) -> dict[str, str]:
    """Where win and lose, or the image alone, lie, in words: a file, or a name in what holds it."""
    images = run.source[pair.index].images
    return dict(zip(SIDES[len(images)], map(_where, images), strict=True))


def _where(image: ImageRef) -> str:
    if image.path is None:
        return image.uid
    return image.path if image.span is None else f"{image.uid} in {image.path}"


@torch.no_grad()
def _decoded(run: Run, latents: torch.Tensor) -> torch.Tensor:
    """Latents [N, C, h, w] of the posterior, unscaled -> pixels [N, 3, H, W] uint8."""
    vae = run.model.vae
    vae.to(run.device)
    pixels = run.model.family.decode(vae, latents.to(run.device, next(vae.parameters()).dtype))
    if run.encoder.offload:
        vae.to("cpu")
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

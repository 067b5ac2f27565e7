"""Implicit preference accuracy: how often a model ranks labelled pairs as people did, by its denoising errors.

A pair counts as right where the model's error on the preferred image fell more, against the base model's, than that on
the other one (Rafailov et al. 2023, arXiv 2305.18290, for language; Wallace et al. 2024, arXiv 2311.12908, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from dpo.data.batches import held_out_batches
from dpo.data.buckets import find
from dpo.data.loader import Reading
from dpo.data.sources import open_source
from dpo.encode import Encoder
from dpo.models.family import Denoiser
from dpo.models.ready import cast, held_narrow, load_model, pick_device, settle
from dpo.objective import implicit_accuracy
from dpo.pages.figures import DECILES
from dpo.settings.config import Config
from dpo.training import validation
from dpo.training.denoisers import pair_step


def by_side(
    config: Config, base: Callable[[], Denoiser], policies: Mapping[str, Callable[[], Denoiser]]
) -> Iterator[dict[str, Any]]:
    """The accuracy of each policy on the pairs of config.data, in reference to `base`.

    config.model: whose VAE and text encoders see the pairs. base, policies: the denoiser of the base and of each side by
    name, loaded only when its turn comes, in fp32 on the CPU. Yields
    {side, accuracy, interval, pairs, draws, deciles: [10] accuracy by tenth of the clock, None where nothing was
    drawn}. Raises UserError where the pairs or the base cannot be loaded.
    """
    device = pick_device(config.runtime.device)
    source = open_source(config.data)
    narrow = held_narrow(config, device)
    config, loaded, plan, _ = load_model(config, device, narrow=narrow, without_denoiser=True, by_files=True)
    model = replace(loaded, denoiser=base().eval())
    cast(model, config.runtime.precision, config.runtime.vae_precision)
    data = config.data
    assert data.resolution is not None, "decided when the model was loaded"
    reference = model.denoise(settle(config.runtime, model.denoiser, device))
    step, _ = pair_step(config, model, plan, reference, None, device)
    encoder = Encoder(model, device, config.runtime.vae_batch)
    buckets = find(data, model.geometry.side_factor, source)
    reading = replace(Reading.of(data), workers=0)
    pairs = held_out_batches(source, config.optim.batch_size, data.resolution, reading, buckets=buckets)
    held_out = validation.encode_held_out(step, encoder, pairs, data.validation_draws, None)
    if held_out is None:
        return
    timesteps = validation.drawn_timesteps(step, held_out)
    decile = timesteps * DECILES // plan.length
    for name, load in policies.items():
        denoiser = load().eval()
        found = replace(step, policy=model.denoise(settle(config.runtime, denoiser, device)))
        d = validation.differences(found, held_out)
        figures = validation.figures(d.mean(0), validation.captions_of(held_out))
        each = implicit_accuracy(d)
        yield {
            "side": name,
            "accuracy": figures["heldout_accuracy"],
            "interval": figures["heldout_interval"],
            "pairs": figures["heldout_pairs"],
            "draws": held_out.draws,
            "deciles": [float(each[decile == k].mean()) if (decile == k).any() else None for k in range(DECILES)],
        }
        del found, denoiser
        if device.type == "cuda":
            torch.cuda.empty_cache()

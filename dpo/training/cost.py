"""What a run computes, in counted FLOPs: training on a pair, and the share of the run that goes to held-out accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo.data.kept import leaves_rest
from dpo.methods import METHODS
from dpo.models.family import Model
from dpo.settings.config import Config
from dpo.training import flops

SHARE = 0.05  # of a run's FLOPs, at most, for held-out accuracies where --validate-every is left open
USUAL = 100  # updates between them where they cost less


@dataclass(frozen=True)
class Cost:
    """Counted FLOPs."""

    forward: float  # of one image through the denoiser
    encode: float  # of one image through the VAE
    pair: float  # of training on one pair
    kept: float  # of training on one whose encoding is there already
    sides: int = 2  # images of a pair; 1 where they have no partners


def count(config: Config, model: Model, *, live_reference: bool, encoded: bool, sides: int = 2) -> Cost:
    """The cost of a decided config with this model; encoded: latents and text of the pairs come from a store.

    sides: images of a pair.
    """
    resolution = config.data.resolution
    assert resolution is not None, "decided when the model was loaded"
    side = resolution // model.geometry.vae_scale
    forward = flops.forward_flops(model, side, side)
    encode = flops.vae_encode_flops(model.vae.config, resolution, resolution, model.family.name)
    return of(config, forward, encode, live_reference=live_reference, encoded=encoded, sides=sides)


def of(config: Config, forward: float, encode: float, *, live_reference: bool, encoded: bool, sides: int = 2) -> Cost:
    """The cost of a config, from the FLOPs of one image through denoiser and VAE."""
    kept, pair = (
        flops.pair_flops(
            forward,
            trainable="lora" if config.lora.lora else "full",
            reference="live" if live_reference else None,
            halves=1 if METHODS[config.method.method].images == "winner" else sides,
            encode=of_encoding,
        )
        for of_encoding in (0.0, 0.0 if encoded else encode)
    )
    return Cost(forward, encode, pair, kept, sides)


def training(cost: Cost, config: Config, steps: int, source: int, processes: int = 1) -> float:
    """FLOPs of `steps` updates on a set of `source` pairs, without held-out accuracies."""
    seen = steps * config.optim.pairs
    anew = encoded_anew(config, seen, source, processes, cost.sides)
    return anew * cost.pair + (seen - anew) * cost.kept


def encoded_anew(config: Config, seen: int, source: int, processes: int = 1, sides: int = 2) -> int:
    """How many of the `seen` pairs a run of a decided config encodes at most, of a set of `source` pairs.

    sides: images of a pair. Where encodings are kept each process makes them once, and once more where images are mirrored.
    """
    if config.runtime.keep_encoded != "on" or leaves_rest(config.runtime, sides * config.optim.batch_size):
        return seen
    return min(seen, source * processes * (2 if config.data.flip else 1))


def validation_share(
    cost: Cost, config: Config, trained: float, steps: int, pairs: int, *, every: int, encoded: bool
) -> float:
    """The share of a whole run's FLOPs that goes to its held-out accuracies.

    trained: FLOPs of `training`; steps: updates of the run; pairs: held out; every: updates between two accuracies;
    encoded: the held-out pairs come from a store. The last update is always followed by one.
    """
    once, each = _validation(cost, config, pairs, encoded)
    spent = once + each * math.ceil(steps / every)
    return spent / (spent + trained)


def validate_every(cost: Cost, config: Config, trained: float, steps: int, pairs: int, *, encoded: bool) -> int:
    """Updates between held-out accuracies where they are left open: a multiple of USUAL.

    The smallest that keeps them at SHARE of the run's FLOPs; the run's length where one alone costs more. Takes what
    `validation_share` does.
    """
    once, each = _validation(cost, config, pairs, encoded)
    budget = SHARE / (1 - SHARE) * trained
    times = max(1, int((budget - once) // each))
    return max(1, math.ceil(steps / times / USUAL)) * USUAL


def _validation(cost: Cost, config: Config, pairs: int, encoded: bool) -> tuple[float, float]:
    """FLOPs at the start of a run, for latents and the reference's errors, and of each held-out accuracy."""
    each = cost.sides * pairs * config.data.validation_draws * cost.forward
    return each + (0.0 if encoded else cost.sides * pairs * cost.encode), each

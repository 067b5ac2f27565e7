"""dpo.training.cost: what a run computes, and that the held-out accuracies of the presets cost little of it."""

import pytest

from dpo.methods import METHODS
from dpo.settings.config import Config, change
from dpo.settings.flags import load_preset, parse, presets
from dpo.training.cost import SHARE, Cost, encoded_anew, of, training, validate_every, validation_share
from dpo.training.flops import unet_flops, vae_encode_flops
from tests.dpo.training.test_flops import SD15, SDXL, VAE

SD21 = SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
REAL = sorted(
    name
    for name in presets()
    if "model" in (preset := load_preset(name)) and "validation_data" in preset.get("data", {})
)


SLOW = ("sd21", "sdxl", "sdxl-turbo")  # the shapes of SD 1.5, and others for a count of their own


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in REAL])
def test_presets_of_real_models_validate_for_a_twentieth_of_their_flops(name):
    cfg, _ = parse(["--preset", name])
    unet = SDXL if name.startswith("sdxl") else SD21 if name == "sd21" else SD15
    side = cfg.data.resolution or 8 * unet["sample_size"]
    live = METHODS[cfg.method.method].reference
    cost = of(
        cfg,
        unet_flops(unet, side // 8, side // 8),
        vae_encode_flops(VAE, side, side),
        live_reference=live,
        encoded=False,
    )
    every, pairs = cfg.output.validate_every, cfg.data.validation_pairs
    trained = cfg.optim.steps * cfg.optim.pairs * cost.pair
    share = validation_share(cost, cfg, trained, cfg.optim.steps, pairs, every=every, encoded=False)
    assert 0 < share <= SHARE
    assert cfg.optim.steps / every >= 4 and pairs >= 200, "often enough for a curve, pairs enough for +-0.06"


# Counts in units of a forward: 10 updates of 8 pairs, 4 forwards an image and 1 of the VAE.
COST = Cost(forward=1.0, encode=1.0, pair=2 * (4 + 1), kept=2 * 4)
RUN = change(Config(), batch_size=4, accumulation=2, validation_draws=3, keep_encoded="off")


def test_the_share_counts_every_forward():
    trained = training(COST, RUN, 10, 40)
    assert trained == 10 * 8 * 10
    once, each = 2 * 5 * 3 + 2 * 5, 2 * 5 * 3  # reference errors and latents; five pairs in three draws
    for every, times in ((1, 10), (3, 4), (5, 2), (10, 1), (99, 1)):
        spent = once + times * each
        expected = spent / (spent + trained)
        assert validation_share(COST, RUN, trained, 10, 5, every=every, encoded=False) == pytest.approx(expected)
    stored = validation_share(COST, RUN, trained, 10, 5, every=10, encoded=True)
    assert stored == pytest.approx(2 * each / (2 * each + trained))


@pytest.mark.parametrize(
    ("changes", "processes", "encoded"),
    [
        ({}, 1, 20),  # kept from their first use: 80 pairs are four epochs of 20
        ({"keep_encoded": "off"}, 1, 80),
        ({"flip": True}, 1, 40),  # mirrored ones are others
        ({}, 3, 60),  # each process makes its own
        ({"flip": True}, 4, 80),  # none comes twice
        ({"vae_batch": 3}, 1, 80),  # calls of 3, 3 and 2 images: none is kept
    ],
)
def test_pairs_that_are_kept_are_encoded_once(changes, processes, encoded):
    config = change(RUN, **{"keep_encoded": "on", **changes})
    assert encoded_anew(config, 80, 20, processes) == encoded
    assert training(COST, config, 10, 20, processes) == encoded * 10 + (80 - encoded) * 8


def test_an_image_without_a_partner_costs_half_of_a_pair():
    config = change(RUN, method="kto", keep_encoded="on", vae_batch=4)  # whole: a micro-batch has 4 images
    pair, image = (of(config, 1.0, 1.0, live_reference=True, encoded=False, sides=sides) for sides in (2, 1))
    assert image.pair == pair.pair / 2 and image.kept == pair.kept / 2
    assert validation_share(image, config, 1.0, 10, 5, every=1, encoded=False) < validation_share(
        pair, config, 1.0, 10, 5, every=1, encoded=False
    )
    assert encoded_anew(change(config, vae_batch=3), 80, 20, 1, 1) == 80 and encoded_anew(config, 80, 20, 1, 1) == 20


@pytest.mark.parametrize("steps", [1, 150, 2000, 10000])
@pytest.mark.parametrize("pairs", [50, 256])
def test_an_interval_left_open_keeps_to_the_share_or_validates_once(steps, pairs):
    trained = training(COST, RUN, steps, 40)
    every = validate_every(COST, RUN, trained, steps, pairs, encoded=False)
    assert every % 100 == 0 and every >= 100
    share = validation_share(COST, RUN, trained, steps, pairs, every=every, encoded=False)
    assert share <= SHARE or every >= steps
    if every > 100:
        assert validation_share(COST, RUN, trained, steps, pairs, every=every - 100, encoded=False) > SHARE

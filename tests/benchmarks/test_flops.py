"""The counted FLOPs of a step: what each part must cost, and the figures of the real models."""

from dataclasses import replace

import pytest

from benchmarks import flops
from benchmarks.sizes import SD15, SDXL, SMALL_UNET
from dpo.training.flops import pair_flops, unet_flops

SMALL = replace(SD15, unet=SMALL_UNET, text=(7, 32), encoders=({"num_hidden_layers": 1},))


@pytest.mark.slow
def test_the_count_sees_what_is_saved():
    rows = {(row["trained"], row["checkpointing"]): row for row in flops.rows((SMALL,))}
    forward = unet_flops(SMALL.unet, 64, 64, 7) / flops.TERA
    full, low_rank = rows["full", "off"], rows["LoRA", "off"]
    assert full["prepared"] - full["prepared + recorded"] == pytest.approx(2 * forward)
    assert full["prepared + recorded"] == pytest.approx(pair_flops(forward, reference="recorded"), rel=0.02)
    assert low_rank["prepared + recorded"] < full["prepared + recorded"]
    assert low_rank["prepared"] - low_rank["prepared + recorded"] == pytest.approx(2 * forward)
    for kind in ("full", "LoRA"):
        again = rows[kind, "on"]["prepared"] - rows[kind, "off"]["prepared"]
        assert 0.5 * 2 * forward < again < 1.05 * 2 * forward
    assert all(row["images"] > row["prepared"] for row in rows.values())


@pytest.mark.slow
def test_the_real_models():
    """TFLOP per pair, prepared and recorded, full: 4.8 for SD 1.5 at 512 px and 40.4 for SDXL at 1024 px; LoRA less."""
    found = {(row["model"], row["trained"], row["checkpointing"]): row for row in flops.rows((SD15, SDXL))}
    for model, recorded, images in ((SD15, 4.8, 8.79), (SDXL, 40.4, 64.6)):
        full, low_rank = found[model.name, "full", "off"], found[model.name, "LoRA", "off"]
        assert full["prepared + recorded"] == pytest.approx(recorded, rel=0.005)
        assert full["images"] == pytest.approx(images, rel=0.02)
        assert low_rank["prepared + recorded"] < 0.75 * recorded
        assert full["peers / ours"] > 1.5


@pytest.mark.slow
def test_flow_models_cost_what_their_parts_do(world):
    rows = {(row["trained"], row["checkpointing"]): row for row in flops.flow_rows({"tiny": world("sd35")}, 64)}
    full, low_rank = rows["full", "off"], rows["LoRA", "off"]
    forward = (full["prepared"] - full["prepared + recorded"]) / 2
    assert forward > 0 and low_rank["prepared"] - low_rank["prepared + recorded"] == pytest.approx(2 * forward)
    assert 6 * forward < full["prepared + recorded"] < 7 * forward, "attention's backward costs more than two forwards"
    for kind in ("full", "LoRA"):
        again = rows[kind, "on"]["prepared"] - rows[kind, "off"]["prepared"]
        assert 0.5 * 2 * forward < again < 1.5 * 2 * forward
    assert all(row["images"] > row["prepared"] for row in rows.values())

"""dpo.settings.advice: the line that a run starts with, and what is allowed but probably not meant."""

import pytest

from dpo.settings.advice import headline, length, too_long, warnings
from dpo.settings.config import change, from_mapping
from dpo.settings.resolve import dealt
from tests.dpo.settings.test_config import PAIRED


def test_headline():
    cfg = from_mapping(
        {"batch_size": 4, "accumulation": 8, "epochs": 2.0, "learning_rate": 1e-8, "scale_lr": True, "beta": 2000.0}
    )
    line = headline(dealt(change(cfg, warmup=10), 2), processes=2)
    for part in ("dpo, all weights", "64 pairs", "4 x 8 x 2", "6.4e-07", "10 updates of warm-up", "beta 2000"):
        assert part in line
    assert "beta" not in headline(change(cfg, method="sft")) and "LoRA of rank 8" in headline(change(cfg, lora=True))


FLOW = {"prediction_type": "flow_prediction", "lora": True}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 2.048e-8}, "a thousandth"),
        ({"learning_rate": 1e-8, "scale_lr": True}, "a thousandth"),
        ({"learning_rate": 1e-3}, "noise"),
        ({"method": "dde", "beta": 5000.0, "prediction_type": "epsilon"}, "a tenth"),
        ({"learning_rate": 5e-3, "lora": True}, "noise"),
        ({"batch_size": 2} | PAIRED, "raise --accumulation"),
        ({"batch_size": 2, "gradient_release": True} | PAIRED, "only a larger --batch-size"),
        (PAIRED | {"validation_fraction": 0.0}, "--validation-fraction"),
        ({"steps": 10, "warmup": 10}, "warm-up"),
        ({"family": "sdxl", "vae_precision": "fp16"}, "overflows in fp16"),
        (FLOW | {"beta": 499.0, "learning_rate": 1e-4}, "beta 499 with learning rate 0.0001"),
        (FLOW | {"beta": 100.0, "learning_rate": 1e-5, "scale_lr": True, "batch_size": 16}, "report that it collapses"),
    ],
)
def test_warnings(values, words):
    assert any(words in warning for warning in warnings(from_mapping(values)))


@pytest.mark.parametrize(
    "values",
    [
        {"beta": 500.0, "learning_rate": 1e-4},
        {"beta": 100.0, "learning_rate": 9e-5},
        {"beta": 100.0, "learning_rate": 1e-4, "method": "sft"},
        {"beta": 100.0, "learning_rate": 1e-4, "prediction_type": "epsilon"},
    ],
)
def test_a_small_beta_is_warned_of_at_high_rates_of_a_flow_alone(values):
    assert not any("collapses" in warning for warning in warnings(from_mapping(FLOW | values)))


def test_a_length_in_epochs_is_said_in_updates():
    cfg = from_mapping({"batch_size": 4, "accumulation": 4, "epochs": 3})
    assert length(cfg, 1500) == ["3 epochs of 1,500 pairs = 282 updates"]
    assert length(change(cfg, epochs=0.5), 150) == ["0.5 epochs of 150 pairs = 5 updates"]
    assert length(change(cfg, epochs=None, steps=7), 150) == []


def test_many_epochs_that_nobody_asked_for_are_said_with_their_number():
    """The steps of a preset for a large set make 213 epochs of 150 pairs."""
    cfg = from_mapping({"batch_size": 8, "accumulation": 2, "steps": 2000})
    (line,) = too_long(cfg, 150)
    assert (
        line.startswith("2000 updates of 16 pairs are 213 epochs of these 150 pairs") and "--epochs 10 makes 94" in line
    )
    assert too_long(cfg, 1066) and not too_long(cfg, 1067), "from 30 on"
    asked = change(cfg, steps=None, epochs=213)
    assert too_long(asked, 150) == [], "who asks for them has them"
    assert "warm-up of 10" in too_long(change(asked, epochs=1, warmup=10), 150)[0]


def test_published_settings_raise_no_warning():
    for values in (
        {},
        PAIRED | {"accumulation": 4},  # held-out pairs are left open
        {"learning_rate": 1e-8, "scale_lr": True, "accumulation": 512},
        {"lora": True, "learning_rate": 5e-4},
    ):
        assert warnings(from_mapping(values)) == []

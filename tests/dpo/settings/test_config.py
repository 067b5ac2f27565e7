"""The settings: one definition, read back exactly from every form, checked on the way in."""

import dataclasses
import math
import subprocess
import sys
import tomllib

import pytest

from dpo.common.errors import UserError
from dpo.settings.advice import headline, warnings
from dpo.settings.config import Config, change, flatten, from_mapping, groups, specs, to_toml, validate
from dpo.settings.fields import coerce
from dpo.settings.resolve import learning_rate, resolve, resume_changes, total_steps

PAIRED = {"model": "m", "data": "d"}
SDXL = {"family": "sdxl", "beta": 5000.0, "guidance": 5.0, "native_resolution": 1024}
SPECIAL = {"checkpointing": "down_blocks.0,mid_block", "device": "cuda:1", "resolution": 768, "window_high": 900}


def another(name):
    """A valid value of this setting that is not its default."""
    spec = specs()[name]
    if name in SPECIAL:
        return SPECIAL[name]
    if spec.many:
        return (
            ("a man, a dog", "x")
            if spec.kind is str and not spec.meta["separator"]
            else ("b", "c")
            if spec.kind is str
            else (3, 4)
        )
    if spec.kind is bool:
        return not spec.default
    if spec.meta["choices"]:
        return next(choice for choice in spec.meta["choices"] if choice != spec.default)
    if spec.kind is str:
        return "some 'quoted\" ü path\\n"
    return coerce(spec, max(spec.meta["low"] or 0, 0) + (7 if spec.kind is int else 0.123456789))


def altered(name):
    """The default configuration with one setting changed, and what must go with it."""
    values = {name: another(name)}
    if name in PAIRED:
        values = PAIRED | values
    if name == "reference":
        values["reference"] = "recorded"
    return change(Config(), **values), values


def test_names_are_unique_documented_and_frozen():
    assert len(specs()) == sum(len(dataclasses.fields(cls)) for cls in groups().values())
    aliases = [alias for spec in specs().values() for alias in spec.meta["aliases"]]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & set(specs())
    for spec in specs().values():
        assert spec.meta["help"] and "\n" not in spec.meta["help"] and len(spec.meta["help"]) < 125
        assert spec.meta["resume"] in ("free", "said", "refused")
        assert coerce(spec, spec.default) == spec.default
        assert not spec.optional or spec.default is None, "an unset setting must be the default: TOML has no null"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.steps = 3


@pytest.mark.parametrize("name", list(specs()))
def test_every_setting_survives_toml_and_mapping(name):
    cfg, values = altered(name)
    assert flatten(cfg) == flatten(Config()) | values
    for comments in (True, False):
        assert from_mapping(tomllib.loads(to_toml(cfg, comments))) == cfg
    assert from_mapping(flatten(cfg)) == cfg


def test_toml_is_grouped_and_explains_itself():
    text = to_toml(Config())
    assert list(tomllib.loads(text)) == list(groups())
    assert all(spec.meta["help"] in text for spec in specs().values())
    assert "# beta =" in text
    assert "#" not in to_toml(Config(), comments=False)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"optim": {"learning_rat": 1}}, "learning_rate"),
        ({"train_batch_size": 1}, "batch_size"),
        ({"qqqq": 1}, "--help"),
        ({"optim": {"model": "x"}}, "belongs to [model]"),
        ({"steps": 3, "optim": {"steps": 4}}, "twice"),
        ({"steps": 2.5}, "a whole number (updates) at least 1"),
        ({"steps": True}, "whole number"),
        ({"steps": 0}, "at least 1"),
        ({"flip": "maybe"}, "true or false"),
        ({"flip": 2}, "true or false"),
        ({"learning_rate": "nan"}, "a number"),
        ({"learning_rate": 0}, "above 0"),
        ({"output": ""}, "text"),
        ({"method": "dd"}, "one of dpo, discounted, dde-single, dde-step, dde, sft (did you mean dde?)"),
        ({"loss": "cpo"}, "one of sigmoid, hinge, ipo"),
        ({"sample_seeds": 3}, "expected a list"),
        ({"sample_seeds": [1, "x"]}, "whole number"),
        ({"caption_dropout": 1.5}, "at most 1"),
    ],
)
def test_bad_values_are_refused_in_one_line(mapping, words):
    with pytest.raises(UserError) as caught:
        from_mapping(mapping)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"window_low": 500, "window_high": 500}, "below"),
        ({"label_smoothing": 0.5}, "nothing to learn"),
        ({"validation_fraction": 0.1, "validation_data": "v"}, "give one"),
        ({"resolution": 513}, "multiple of 8"),
        ({"method": "sft", "loss": "ipo"}, "sft"),
        ({"method": "sft", "sft_weight": 1.0}, "sft"),
        ({"method": "sft", "label_smoothing": 0.1}, "sft"),
        ({"method": "sft", "reference": "recorded"}, "no reference"),
        ({"reference": "adapter"}, "--lora"),
        ({"reference": "adapter", "lora": True, "unet_init": "u", "reference_model": "base"}, "--reference copy"),
        ({"precision": "fp64", "optimizer": "adamw8bit"}, "adamw"),
        ({"checkpointing": "some"}, "down_blocks.0"),
        ({"device": "gpu"}, "cuda:N"),
        ({"device": "cpu", "kernels": "triton"}, "needs a GPU"),
        ({"resume": "latest", "overwrite": True}, "give one"),
    ],
)
def test_bad_combinations_are_refused_in_one_line(values, words):
    with pytest.raises(UserError) as caught:
        from_mapping(values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_built_in_python_is_checked_too():
    cfg = Config()
    validate(cfg)
    with pytest.raises(UserError, match="steps"):
        validate(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, steps=-1)))
    with pytest.raises(UserError, match="a number"):
        validate(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, learning_rate=math.inf)))


def decide(values=(), *, prediction_type="epsilon", device="cpu", **facts):
    facts = {"family": "sd"} | facts
    return resolve(from_mapping(dict(values)), prediction_type=prediction_type, device=device, **facts)


def test_resolve_leaves_nothing_open_and_is_stable():
    cfg, notes = decide()
    open_ones = {name for name, value in flatten(cfg).items() if value == "auto"}
    assert open_ones == {"data_format", "zero_snr"}, "these two are read from the data and from the model's schedule"
    assert (cfg.data.resolution, cfg.runtime.precision, cfg.optim.optimizer, cfg.optim.steps) == (512, "fp32", "adamw", 2000)
    assert (cfg.lora.alpha, cfg.method.window_high, cfg.output.sample_steps, cfg.output.sample_guidance) == (8.0, 1000, 50, 7.5)
    assert len(notes) == 1 and "beta 2000" in notes[0]
    assert decide(flatten(cfg)) == (cfg, [])


@pytest.mark.parametrize(
    ("values", "facts", "beta"),
    [
        ({}, {}, 2000),
        ({"method": "discounted"}, {}, 2000),
        ({"method": "dde-step"}, {}, 2000),
        ({"method": "dde"}, {}, 200),
        ({"method": "dde-single"}, SDXL, 500),
        ({"method": "dde"}, {"prediction_type": "v_prediction"}, 2000),
        ({}, SDXL, 5000),
        ({"beta": 17.0}, SDXL, 17),
    ],
)
def test_default_beta(values, facts, beta):
    assert decide(values, **facts)[0].method.beta == beta


def test_resolve_on_a_gpu_for_turbo_and_for_lora():
    cfg, _ = decide({"lora": True, "rank": 4}, device="cuda", turbo=True, **(SDXL | {"native_resolution": 512}))
    assert (cfg.model.timesteps, cfg.output.sample_steps, cfg.output.sample_guidance) == ("turbo", 4, 0.0)
    assert (cfg.runtime.precision, cfg.runtime.reference, cfg.lora.alpha) == ("bf16", "adapter", 4.0)
    assert cfg.runtime.channels_last == "on" and cfg.optim.optimizer in ("adamw8bit", "adamw")
    assert decide(device="cuda", bf16=False)[0].runtime.precision == "fp16"
    both = {"lora": True, "unet_init": "u", "reference_model": "base"}
    assert decide(both)[0].runtime.reference == "copy"
    fallback, notes = decide({"precision": "fp16"})
    assert fallback.runtime.precision == "fp32" and any("fp16" in note for note in notes)


def test_a_prediction_type_that_is_asked_for_beats_the_models():
    cfg, _ = decide({"prediction_type": "v_prediction", "method": "dde"})
    assert (cfg.model.prediction_type, cfg.method.beta) == ("v_prediction", 2000.0)


def test_resolve_refuses_what_the_model_or_device_cannot_do():
    for values, words in (({"family": "sdxl"}, "family sd"), ({"kernels": "triton"}, "GPU")):
        with pytest.raises(UserError, match=words):
            decide(values)
    with pytest.raises(UserError, match="100 timesteps"):
        decide({"window_high": 200}, num_timesteps=100)


def test_length_rate_and_headline():
    cfg = from_mapping(
        {"batch_size": 4, "accumulation": 8, "epochs": 2.0, "learning_rate": 1e-8, "scale_lr": True, "beta": 2000.0}
    )
    assert total_steps(cfg, pairs=100) == 7 and total_steps(cfg, pairs=100, processes=2) == 4
    assert total_steps(change(cfg, steps=5), pairs=100) == 5 and total_steps(Config(), pairs=9) == 2000
    assert learning_rate(cfg) == pytest.approx(3.2e-7) and learning_rate(cfg, processes=2) == pytest.approx(6.4e-7)
    line = headline(change(cfg, warmup=10), processes=2)
    for part in ("dpo, full UNet", "64 pairs", "4 x 8 x 2", "6.4e-07", "10 updates of warm-up", "beta 2000"):
        assert part in line
    assert "beta" not in headline(change(cfg, method="sft")) and "LoRA of rank 8" in headline(change(cfg, lora=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 2.048e-8}, "a thousandth"),
        ({"learning_rate": 1e-8, "scale_lr": True}, "a thousandth"),
        ({"learning_rate": 1e-3}, "noise"),
        ({"method": "dde", "beta": 5000.0, "prediction_type": "epsilon"}, "a tenth"),
        ({"learning_rate": 5e-3, "lora": True}, "noise"),
        ({"batch_size": 2} | PAIRED, "--accumulation"),
        (PAIRED, "--validation-fraction"),
        ({"steps": 10, "warmup": 10}, "warm-up"),
    ],
)
def test_warnings(values, words):
    assert any(words in warning for warning in warnings(from_mapping(values)))


def test_published_settings_raise_no_warning():
    for values in ({}, {"learning_rate": 1e-8, "scale_lr": True, "accumulation": 512}, {"lora": True, "learning_rate": 5e-4}):
        assert warnings(from_mapping(values)) == []


RESUME = [
    ({"workers": 3}, "free"),
    ({"steps": 4000}, "free"),
    ({"checkpoint_every": 7}, "free"),
    ({"steps": 4000, "scheduler": "cosine"}, "said"),
    ({"learning_rate": 2e-5}, "said"),
    ({"beta": 10.0}, "said"),
    ({"precision": "bf16"}, "said"),
    ({"precision": "bf16-pure", "optimizer": "adamw8bit"}, "refused"),
    ({"seed": 1}, "refused"),
    ({"method": "dde"}, "refused"),
    ({"ties": "keep"}, "refused"),
    ({"ema": 0.99}, "refused"),
    ({"optimizer": "adafactor"}, "refused"),
    ({"lora": True}, "refused"),
    ({"rank": 3, "alpha": 3.0}, "free"),
]


@pytest.mark.parametrize(("values", "rule"), RESUME)
def test_changes_on_resume(values, rule):
    old, _ = decide()
    allowed, refused = resume_changes(old, change(old, **values))
    assert (bool(allowed), bool(refused)) == (rule == "said", rule == "refused")
    assert resume_changes(old, old) == ([], [])


def test_changed_rank_of_a_lora_run_is_refused_and_named():
    old, _ = decide({"lora": True})
    _, refused = resume_changes(old, change(old, rank=16))
    assert refused == ["rank 8 -> 16"]


def test_the_command_line_starts_without_torch():
    code = "import sys; from dpo.settings import flags, resolve; flags.parse([]); print(*{'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
